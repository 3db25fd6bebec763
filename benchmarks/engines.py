"""Serve folded checkpoints in unmodified engines and compare with transformers, token by token.

    python benchmarks/engines.py PYTHON [vllm] [llama_cpp] [plugin] [FOLDER ...] [--only WORDS …] [--keep]

PYTHON is the interpreter of an environment with the engines, vLLM's CPU build and llama-cpp-python (`make engines` makes it).
The demo model, random models of several families and, where it lies at hand, stories260k are folded in several ways, unhealed,
in float32; each checkpoint continues the same prompts greedily in transformers and in an engine. Prints a table: how many
greedy tokens agree, and the largest difference of their log-probabilities in millionths; and, of GGUF files, how many texts are
read as the same tokens. Exit code 1 when any differ. `--only` takes the rows whose names hold one of these; `--keep` puts what
they say into docs/results/engines.json.

`plugin` is our own layout in vLLM, by kvfold.serving. Of those checkpoints of the demo model, and of any other FOLDER with one,
the table also says how many requests of mixed lengths (64, and 16 of a FOLDER) are continued alike at once and one by one, how
many tokens of a shared beginning were not computed again, how many tokens the same memory holds against the source's, and how
fast they go. One prompt more of a FOLDER is continued by 256 tokens.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.publishing.gguf import write_gguf
from kvfold.convert.source.data import load_tokenizer, load_windows
from kvfold.recipes.demo.demo import MODEL, write_texts
from kvfold.recipes.model import open_folded
from kvfold.surgery.kvfold_attention import exchange

NEW_TOKENS, LONG, TOLERANCE, MIXED = 32, 256, 1e-3, 64
STORIES = Path(os.environ.get("KVFOLD_SHARED", "../shared")) / "models/stories260k"
KEPT = Path(__file__).parent.parent / "docs/results/engines.json"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
RANDOM: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3.1": {"model_type": "llama", "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 100},
    "phi3": {"pad_token_id": 0, "eos_token_id": 1},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": EXPERTS,
}
"""Families of random models of three layers with 6 query and 6 key heads of 32, and what their configs say besides."""
WIDE = {"to": "mla", "kv_rank": 60, "rope_dim": 12, "layout": "kvfold"}
FOLDS: dict[str, tuple[str, Path | str, dict[str, Any]]] = {
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
    "mla 64 + 16, two of six layers": ("plugin", MODEL, {**WIDE, "kv_rank": 64, "rope_dim": 16, "layers": "1,4"}),
    **{f"random {family}, gqa 2": ("vllm", family, {"to": "gqa", "kv_heads": 2}) for family in ("qwen3", "phi3", "mixtral")},
    **{f"random {family}, mla 60 + 12": ("plugin", family, WIDE) for family in ("qwen2", "qwen3", "mixtral", "qwen3_moe")},
    "random mistral, window of 100, mfa-kr 60": ("plugin", "mistral", {"to": "mfa-kr", "width": 60}),
    "random llama, RoPE of Llama 3.1, mfa-kr 60": ("plugin", "llama3.1", {"to": "mfa-kr", "width": 60}),
    "random llama, mla 60 + 12, queries of rank 24": ("plugin", "llama", {**WIDE, "q_rank": 24}),
    "random llama, mla 60 + 12, two ranks": ("plugin", "llama", WIDE),
    "random qwen3, mfa-kr 60, two ranks": ("plugin", "qwen3", {"to": "mfa-kr", "width": 60}),
    "mla 106 + 22": ("llama_cpp", MODEL, {"to": "mla", "kv_budget": "25%"}),
    "stories260k, mla 24 + 8": ("llama_cpp", STORIES, {"to": "mla", "kv_rank": 24, "rope_dim": 8}),
}
RANKS = {name: 2 for name in FOLDS if name.endswith("two ranks")}
"""Over how many processes vLLM spreads the heads of a row, where it is not one."""


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
def in_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Greedy tokens, decoded with a cache, and their log-probabilities, worked out at once and without one."""
    found = []
    for prompt in prompts:
        out, cache = torch.tensor([prompt]), DynamicCache(config=model.config)
        for _ in range(new_tokens):
            new = out[:, cache.get_seq_length() :]
            out = torch.cat([out, model(new, past_key_values=cache).logits[:, -1:].argmax(-1)], dim=1)
        logprobs = model(out, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        tokens = out[0, len(prompt) :]
        found.append({"tokens": tokens.tolist(), "logprobs": logprobs.gather(1, tokens[:, None])[:, 0].tolist()})
    return found


def random_model(family: str, folder: Path) -> Path:
    """Heads attend far from uniformly, so that what is read wrongly shows; with the demo model's tokenizer."""
    shape = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 512}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32, "vocab_size": 2048}
    config = AutoConfig.for_model(**{"model_type": family, **shape, "tie_word_embeddings": False, **RANDOM[family]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "self_attn" in name:
            parameter.data.uniform_(0.5, 2.0) if "_norm" in name else parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, folder)
    return folder


def in_engine(engine: str, python: str, folder: Path, prompts: Path) -> dict[str, Any]:
    if engine == "llama_cpp":
        script, target = Path(__file__).with_name("engine_llama_cpp.py"), folder.with_suffix(".gguf")
        write_gguf(folder, target)
        ran = subprocess.run([python, str(script), str(target), str(prompts)], capture_output=True, text=True)
        if ran.returncode:
            sys.exit(f"llama.cpp failed on {target}:\n{ran.stderr[-4000:]}")
        return json.loads(ran.stdout.strip().splitlines()[-1])
    process = vllm(python)
    assert process.stdin and process.stdout
    print(json.dumps([str(folder), str(prompts)]), file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"vLLM failed on {folder}: see above")


@cache
def vllm(python: str) -> subprocess.Popen[str]:
    """One for all checkpoints: it takes longer to start than most take to be asked."""
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    script = str(Path(__file__).with_name("engine_vllm.py"))
    return subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def asked(folder: Path, root: Path, mixed: int, long: int, ranks: int = 1) -> tuple[Path, list[list[int]], list[str]]:
    """What a checkpoint is asked, in a file for the engine; the prompts, and the texts that they are cut from."""
    heldout = write_texts(root)[1]
    texts = [path.read_text() for path in sorted(heldout.iterdir())]
    windows = load_windows(str(heldout), folder, 64, 512).ids.tolist()
    question = {"ids": windows, "new_tokens": NEW_TOKENS, "long": long, "ranks": ranks, "texts": texts}
    if mixed:
        ids, lengths = [i for window in windows for i in window], random.Random(0)
        question["mixed"] = [ids[at : at + lengths.randint(1, 200)] for at in range(0, mixed * 4, 4)]
    (root / "prompts.json").write_text(json.dumps(question))
    return root / "prompts.json", windows, texts


@cache
def of_source(python: str, source: Path) -> dict[str, Any]:
    """The source in vLLM, with the same prompts."""
    with tempfile.TemporaryDirectory() as scratch:
        return in_engine("vllm", python, source, asked(source, Path(scratch), mixed=0, long=0)[0])


def fold(name: str, root: Path) -> Path:
    """A row's checkpoint."""
    _, source, choice = FOLDS[name]
    source = source if isinstance(source, Path) else random_model(source, root / "source")
    text = f"{source}/tokens.safetensors:calibration" if source == STORIES else str(write_texts(root)[0])
    convert(
        str(source),
        root / "fold",
        ConvertSettings(
            **choice, calibrate=text, calibration_tokens=16384 if source == MODEL else 2048, heal_steps=0, dtype="float32"
        ),
    )
    return root / "fold"


def agreement(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[int, int, float]:
    """How many greedy tokens are the same, of how many, and how far log-probabilities differ at most, in millionths."""
    pairs = [
        (a == b, abs(x - y))
        for mine, other in zip(ours, theirs, strict=True)
        for a, b, x, y in zip(mine["tokens"], other["tokens"], mine["logprobs"], other["logprobs"], strict=True)
    ]
    return sum(same for same, _ in pairs), len(pairs), max(difference for _, difference in pairs) * 1e6


def compare(
    engine: str, choice: dict[str, Any], python: str, out: Path, root: Path, mixed: int, long: int, ranks: int
) -> dict[str, Any]:
    """Ask both, and say of it what a row of the table says."""
    record = json.loads((out / "kvfold.json").read_text())
    prompts, windows, texts = asked(out, root, mixed, long, ranks)
    theirs, model = in_engine(engine, python, out, prompts), load(out, choice)
    same, tokens, difference = agreement(in_transformers(model, windows, NEW_TOKENS), theirs["found"])
    found = {"architecture": record["target"]["architecture"], "engine": engine, "same_tokens": same, "tokens": tokens}
    if long:
        same, tokens, further = agreement(in_transformers(model, windows[:1], long), theirs["long"])
        found |= {"same_tokens_of_one": same, "tokens_of_one": tokens}
        difference = max(difference, further)
    found["logprob_difference_millionths"] = difference
    if "texts" in theirs:
        tokenizer = load_tokenizer(out)
        mine = (tokenizer(text, verbose=False)["input_ids"] for text in texts)  # some are longer than the model's context
        found["same_texts"] = sum(ids == tokens for ids, tokens in zip(mine, theirs["texts"], strict=True))
        found["texts"] = len(texts)
    if mixed:
        source = of_source(python, Path(record["source"]))
        found |= {
            "requests_alike": theirs["alike"],
            "requests": theirs["requests"],
            "tokens_reused": theirs["reused"],
            "capacity_ratio": theirs["capacity"] / source["capacity"],
            "capacity_ratio_asked": 1 / record["kv_budget"],
            "tokens_per_second": theirs["tokens_per_second"],
            "source_tokens_per_second": source["tokens_per_second"],
        }
    return found


def agrees(row: dict[str, Any]) -> bool:
    """Whether a row says what it should."""
    agreed = row["same_tokens"] == row["tokens"] and row["logprob_difference_millionths"] <= TOLERANCE * 1e6
    agreed &= row.get("same_tokens_of_one") == row.get("tokens_of_one")
    agreed &= row.get("same_texts") == row.get("texts") and row.get("requests_alike") == row.get("requests")
    if "requests" in row:
        agreed &= row["tokens_reused"] > 0 and abs(row["capacity_ratio"] / row["capacity_ratio_asked"] - 1) <= 0.05
    return agreed


def line(name: str, row: dict[str, Any]) -> str:
    cells = [name, row["architecture"], row["engine"], f"{row['same_tokens']} of {row['tokens']}"]
    cells[-1] += f", {row['same_tokens_of_one']} of {row['tokens_of_one']}" if "tokens_of_one" in row else ""
    cells += [f"{row['logprob_difference_millionths']:.1f}", f"{row['same_texts']} of {row['texts']}" if "texts" in row else ""]
    if "requests" in row:
        cells += [f"{row['requests_alike']} of {row['requests']}", str(row["tokens_reused"])]
        cells += [f"{row['capacity_ratio']:.2f}× for {row['capacity_ratio_asked']:.2f}×"]
        cells += [f"{row['tokens_per_second']:.0f} / {row['source_tokens_per_second']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("chosen", nargs="*", help="vllm, llama_cpp, plugin or folders")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names hold one of these")
    parser.add_argument("--keep", action="store_true", help="put the results into docs/results/engines.json")
    args = parser.parse_args()
    engines = [engine for engine in ("vllm", "llama_cpp", "plugin") if engine in args.chosen]
    folders = [Path(folder) for folder in args.chosen if folder not in engines]
    engines = engines if engines or folders else ["vllm", "llama_cpp", "plugin"]
    logging.disable_progress_bar()
    columns = ["checkpoint", "architecture", "engine", "greedy tokens that agree", "log-probabilities differ by, millionths"]
    columns += ["texts", "at once as alone", "tokens reused", "tokens held", "tokens/s, source's"]
    print(f"| {' | '.join(columns)} |\n|---|---|---|{'---:|' * 7}")
    wanted = [
        n for n, (engine, source, _) in FOLDS.items() if engine in engines and (source in RANDOM or Path(source).is_dir())
    ]
    rows: list[tuple[str, str, dict[str, Any], Path | None, int]] = [
        (name, *FOLDS[name][::2], None, MIXED if FOLDS[name][:2] == ("plugin", MODEL) else 0)
        for name in wanted
        if any(words in name for words in args.only)
    ]
    rows += [(folder.name, "plugin", {}, folder, MIXED // 4) for folder in folders]
    agreed = True
    for name, engine, choice, folder, mixed in rows:
        with tempfile.TemporaryDirectory() as scratch:
            out, long = folder or fold(name, Path(scratch)), LONG if folder else 0
            row = compare(engine, choice, args.python, out, Path(scratch), mixed, long, RANKS.get(name, 1))
        agreed &= agrees(row)
        print(line(name, row), flush=True)
        if args.keep:
            kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
            KEPT.write_text(json.dumps({**kept, name: row}, indent=1) + "\n")
    sys.exit(not agreed)


if __name__ == "__main__":
    main()
