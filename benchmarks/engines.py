"""Serve folded checkpoints in unmodified engines and compare with transformers, token by token.

    python benchmarks/engines.py PYTHON [vllm] [llama_cpp] [plugin] [FOLDER ...]

PYTHON is the interpreter of an environment with the engines, vLLM's CPU build and llama-cpp-python (`make engines` makes it).
The demo model and, where it lies at hand, stories260k are folded in several ways, unhealed, in float32; each checkpoint
continues the same prompts greedily in transformers and in an engine. Prints a table: how many greedy tokens agree, and the
largest difference of their log-probabilities; and, of GGUF files, how many texts are read as the same tokens. Exit code 1 when
any differ.

`plugin` is our own layout in vLLM, by kvfold.serving. Of those checkpoints, and of any other FOLDER with one, the table also
says how many of 64 requests of mixed lengths are continued alike at once and one by one, how many tokens of a shared beginning
were not computed again, how many tokens the same memory holds against the source's, and how fast they go.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.publishing.gguf import write_gguf
from kvfold.convert.source.data import load_tokenizer, load_windows
from kvfold.recipes.demo.demo import MODEL, write_texts
from kvfold.recipes.model import open_folded
from kvfold.surgery.kvfold_attention import exchange

NEW_TOKENS, TOLERANCE, MIXED = 32, 1e-3, 64
STORIES = Path(os.environ.get("KVFOLD_SHARED", "../shared")) / "models/stories260k"
FOLDS: dict[str, tuple[str, Path, dict[str, Any]]] = {
    "gqa-4": ("vllm", MODEL, {"to": "gqa", "kv_heads": 4}),
    "mqa": ("vllm", MODEL, {"to": "mqa"}),
    "mla 256 + 32 stored as 512 + 64": ("vllm", MODEL, {"to": "mla", "kv_rank": 256, "rope_dim": 32, "pad_for": "vllm-cpu"}),
    "mla 64 + 16 stored as 512 + 64": ("vllm", MODEL, {"to": "mla", "kv_rank": 64, "rope_dim": 16, "pad_for": "vllm-cpu"}),
    "mfa 32": ("vllm", MODEL, {"to": "mfa", "width": 32, "layout": "step3_text"}),
    "mfa 24 stored as 32": ("vllm", MODEL, {"to": "mfa", "width": 24, "layout": "step3_text", "q_rank": 128}),
    "mla 64 + 16": ("plugin", MODEL, {"to": "mla", "kv_rank": 64, "rope_dim": 16, "layout": "kvfold"}),
    "mla, a quarter, widths by layer": ("plugin", MODEL, {"to": "mla", "kv_budget": "25%", "layer_budgets": "measured"}),
    "mla 64, rebuilt keys": ("plugin", MODEL, {"to": "mla", "kv_rank": 64, "keys": "rebuilt"}),
    "mfa 24": ("plugin", MODEL, {"to": "mfa", "width": 24, "layout": "kvfold"}),
    "mfa-kr 48": ("plugin", MODEL, {"to": "mfa-kr", "width": 48}),
    "mla 106 + 22": ("llama_cpp", MODEL, {"to": "mla", "kv_budget": "25%"}),
    "stories260k, mla 24 + 8": ("llama_cpp", STORIES, {"to": "mla", "kv_rank": 24, "rope_dim": 8}),
}


def load(folder: Path, choice: dict[str, Any]) -> Any:
    """The checkpoint in transformers; its factors in the source model's layers where transformers has no class for them."""
    if choice.get("layout") != "step3_text":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    folded = open_folded(folder, None)
    for layer, block in enumerate(model.model.layers):
        exchange(block, folded.attention(layer, meta=False))
    return model


@torch.no_grad()
def in_transformers(model: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    found = []
    for prompt in prompts:
        out = torch.tensor([prompt])
        for _ in range(NEW_TOKENS):
            out = torch.cat([out, model(out, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        logprobs = model(out).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        tokens = out[0, len(prompt) :]
        found.append({"tokens": tokens.tolist(), "logprobs": logprobs.gather(1, tokens[:, None])[:, 0].tolist()})
    return found


def in_engine(engine: str, python: str, folder: Path, prompts: Path) -> dict[str, Any]:
    script, target = Path(__file__).with_name(f"engine_{engine.replace('plugin', 'vllm')}.py"), folder
    if engine == "llama_cpp":
        target = folder.with_suffix(".gguf")
        write_gguf(folder, target)
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    ran = subprocess.run([python, str(script), str(target), str(prompts)], capture_output=True, text=True, env=env)
    if ran.returncode:
        sys.exit(f"{engine} failed on {target}:\n{ran.stderr[-4000:]}")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def asked(folder: Path, root: Path, mixed: bool) -> tuple[Path, list[list[int]], list[str]]:
    """What a checkpoint is asked, in a file for the engine; the prompts, and the texts that they are cut from."""
    heldout = write_texts(root)[1]
    texts = [path.read_text() for path in sorted(heldout.iterdir())]
    windows = load_windows(str(heldout), folder, 64, 512).ids.tolist()
    question = {"ids": windows, "new_tokens": NEW_TOKENS, "texts": texts}
    if mixed:
        ids, lengths = [i for window in windows for i in window], random.Random(0)
        question["mixed"] = [ids[at : at + lengths.randint(1, 200)] for at in range(0, MIXED * 4, 4)]
    (root / "prompts.json").write_text(json.dumps(question))
    return root / "prompts.json", windows, texts


@cache
def of_source(python: str, source: Path) -> dict[str, Any]:
    """The source in vLLM, with the same prompts."""
    with tempfile.TemporaryDirectory() as scratch:
        return in_engine("vllm", python, source, asked(source, Path(scratch), mixed=False)[0])


def fold(name: str, root: Path) -> Path:
    """A row's checkpoint."""
    _, source, choice = FOLDS[name]
    text = str(write_texts(root)[0]) if source == MODEL else f"{source}/tokens.safetensors:calibration"
    convert(
        str(source),
        root / "fold",
        ConvertSettings(**choice, calibrate=text, calibration_tokens=16384, heal_steps=0, dtype="float32"),
    )
    return root / "fold"


def compare(name: str, engine: str, choice: dict[str, Any], python: str, out: Path, root: Path) -> bool:
    """Ask both, print a row of the table; whether they agree."""
    record = json.loads((out / "kvfold.json").read_text())
    prompts, windows, texts = asked(out, root, engine == "plugin")
    ours, theirs = in_transformers(load(out, choice), windows), in_engine(engine, python, out, prompts)
    pairs = [
        (a, b, abs(x - y))
        for mine, other in zip(ours, theirs["found"], strict=True)
        for a, b, x, y in zip(mine["tokens"], other["tokens"], mine["logprobs"], other["logprobs"], strict=True)
    ]
    same, apart = sum(a == b for a, b, _ in pairs), max(difference for _, _, difference in pairs)
    agreed, cell = same == len(pairs) and apart <= TOLERANCE, ""
    if "texts" in theirs:
        tokenizer = load_tokenizer(out)
        mine = (tokenizer(text, verbose=False)["input_ids"] for text in texts)  # some are longer than the model's context
        read = sum(ids == tokens for ids, tokens in zip(mine, theirs["texts"], strict=True))
        agreed, cell = agreed and read == len(texts), f"{read} of {len(texts)}"
    cells = [name, record["target"]["architecture"], engine, f"{same} of {len(pairs)}", f"{apart:.1e}", cell]
    if engine == "plugin":
        source = of_source(python, Path(record["source"]))
        held, kept = source["capacity"] / theirs["capacity"], record["kv_budget"]
        agreed &= theirs["alike"] == theirs["requests"] and theirs["reused"] > 0 and abs(held / kept - 1) <= 0.05
        cells += [f"{theirs['alike']} of {theirs['requests']}", str(theirs["reused"]), f"{1 / held:.2f}× for {1 / kept:.2f}×"]
        cells += [f"{theirs['tokens_per_second']:.0f} / {source['tokens_per_second']:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
    return agreed


def main() -> None:
    python, *chosen = sys.argv[1:]
    engines = [engine for engine in ("vllm", "llama_cpp", "plugin") if engine in chosen]
    folders = [Path(folder) for folder in chosen if folder not in engines]
    engines = engines if engines or folders else ["vllm", "llama_cpp", "plugin"]
    logging.disable_progress_bar()
    columns = ["checkpoint", "architecture", "engine", "greedy tokens that agree", "largest difference of log-probabilities"]
    columns += ["texts", "at once as alone", "tokens reused", "tokens held", "tokens/s, source's"]
    print(f"| {' | '.join(columns)} |\n|---|---|---|{'---:|' * 7}")
    agreed = True
    for name, (engine, source, choice) in FOLDS.items():
        if engine in engines and source.is_dir():
            with tempfile.TemporaryDirectory() as scratch:
                agreed &= compare(name, engine, choice, python, fold(name, Path(scratch)), Path(scratch))
    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            agreed &= compare(folder.name, "plugin", {}, python, folder, Path(scratch))
    sys.exit(not agreed)


if __name__ == "__main__":
    main()
