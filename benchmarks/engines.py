"""Serve folded checkpoints in an unmodified engine and compare with transformers, token by token.

    python benchmarks/engines.py PYTHON [DIR]

PYTHON is the interpreter of an environment with vLLM's CPU build (`make engines` makes it). The demo model is folded in several
ways, unhealed, in float32; each checkpoint continues the same prompts greedily in transformers and in vLLM. Prints a table:
how many greedy tokens agree, and the largest difference of their log-probabilities. Exit code 1 when any differ.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from kvfold.convert.data import load_windows
from kvfold.convert.pipeline import convert
from kvfold.convert.settings import ConvertSettings
from kvfold.convert.stream import FoldedAttention
from kvfold.recipes.demo.demo import MODEL, write_texts
from kvfold.recipes.model import open_folded

NEW_TOKENS, TOLERANCE = 32, 1e-3
FOLDS: dict[str, dict[str, Any]] = {
    "gqa-4": {"to": "gqa", "kv_heads": 4},
    "mqa": {"to": "mqa"},
    "mla 256 + 32 stored as 512 + 64": {"to": "mla", "kv_rank": 256, "rope_dim": 32, "pad_for": "vllm-cpu"},
    "mfa 32": {"to": "mfa", "width": 32, "layout": "step3_text"},
    "mfa 24 stored as 32": {"to": "mfa", "width": 24, "layout": "step3_text", "q_rank": 128},
    "mla 64 + 16 stored as 512 + 64": {"to": "mla", "kv_rank": 64, "rope_dim": 16, "pad_for": "vllm-cpu"},
}


def load(folder: Path, choice: dict[str, Any]) -> Any:
    """The checkpoint in transformers; its factors in the source model's layers where transformers has no class for them."""
    if choice.get("layout") != "step3_text":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    folded = open_folded(folder, None)
    for layer, block in enumerate(model.model.layers):
        block.self_attn = FoldedAttention(folded.attention(layer, meta=False))
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


def in_vllm(python: str, folder: Path, prompts: Path) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("engine_vllm.py")
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    ran = subprocess.run([python, str(script), str(folder), str(prompts)], capture_output=True, text=True, env=env)
    if ran.returncode:
        sys.exit(f"vLLM failed on {folder}:\n{ran.stderr[-4000:]}")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def main() -> None:
    python, where = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    failed = False
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        root = Path(scratch)
        calibration, heldout = write_texts(root)
        windows = load_windows(str(heldout), MODEL, 64, 512)
        prompts = root / "prompts.json"
        prompts.write_text(json.dumps({"ids": windows.ids.tolist(), "new_tokens": NEW_TOKENS}))
        print("| checkpoint | architecture | greedy tokens that agree | largest difference of log-probabilities |")
        print("|---|---|---:|---:|")
        for name, choice in FOLDS.items():
            out = root / name.replace(" ", "")
            settings = ConvertSettings(
                **choice, calibrate=str(calibration), calibration_tokens=16384, heal_steps=0, dtype="float32"
            )
            record = convert(str(MODEL), out, settings).record
            ours, theirs = in_transformers(load(out, choice), windows.ids.tolist()), in_vllm(python, out, prompts)
            same = sum(a == b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x["tokens"], y["tokens"], strict=True))
            total = NEW_TOKENS * len(ours)
            apart = max(
                abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
            )
            print(f"| {name} | {record['target']['architecture']} | {same} of {total} | {apart:.1e} |", flush=True)
            failed |= same != total or apart > TOLERANCE
    sys.exit(failed)


if __name__ == "__main__":
    main()
