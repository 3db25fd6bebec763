"""How far `kvfold plan --device` is off: conversions of small checkpoints of random weights against what was predicted.

    python benchmarks/cost.py [SHAPE…] [--publish]

Seconds are those of the CPU's threads, so that a busy machine does not count; OMP_NUM_THREADS=1 gives the steadiest. --publish
keeps the results in docs/results/cost.json.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from apart import apart
from results import RESULTS
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from kvfold.allocator import hold_memory
from kvfold.convert.pipeline import convert
from kvfold.convert.planning import cost
from kvfold.convert.planning.parameters import source_parameters
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings, parse_settings
from kvfold.convert.source.configfile import read_config

SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
TINY = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
SHAPES: dict[str, dict[str, Any]] = {"tiny": {**TINY, "num_hidden_layers": 10}, "smollm2": {**SMOL, "num_hidden_layers": 3}}
JOBS: dict[str, dict[str, Any]] = {
    "mla": {"to": "mla", "kv_budget": "25%", "layout": "kvfold"},
    "mqa": {"to": "mqa"},
}
LIBRARIES = 700 << 20
"""Bytes of memory that a process has before it begins."""


def made(folder: Path, shape: dict[str, Any], tokens: int = 32768, dtype: str = "float32", window: int = 512) -> Path:
    """A Llama of random weights, with so many random tokens beside it, in windows."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, vocab_size=2048, max_position_embeddings=2048, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):  # drawn there: billions of numbers take minutes on a CPU
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_file({"text": torch.randint(2048, (tokens // window, window), dtype=torch.int16)}, folder / "text.safetensors")
    return folder


def run(source: str, out: str, values: dict[str, Any], clock: str = "process") -> dict[str, Any]:
    """Seconds by step of a conversion, of the CPU's threads or of the `wall`."""
    settings = parse_settings(ConvertSettings, values)
    spent: Counter[str] = Counter()

    def seconds() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() if clock == "wall" else time.process_time()

    last, step = seconds(), "reading"

    def report(share: float | None, line: str) -> None:
        nonlocal last, step
        now = seconds()
        spent[step] += now - last
        known = {"measuring": "folding", "folding": "folding", "healing": "healing", "verifying": "verifying"}
        last, step = now, next((name for word, name in known.items() if word in line), "reading" if share else step)

    convert(source, Path(out), settings, report=report)
    spent[step] += seconds() - last
    return {"spent": dict(spent)}


def peak(parts: dict[str, int]) -> int:
    """Bytes that the host has at most where it is the device, too."""
    return LIBRARIES + parts.get("states", 0) + max(parts["working"], parts.get("healing", 0))


def compared(name: str, job: str, folder: Path) -> dict[str, Any]:
    """One conversion, as it was predicted and as it went."""
    values = {**JOBS[job], "calibrate": f"{folder}/text.safetensors:text", "calibration_tokens": 8192}
    values |= {"heal_steps": 4, "device": "cpu"}
    config = read_config(folder)
    plan = make_plan(config, parse_settings(ConvertSettings, values))
    parameters = source_parameters(config, plan.spec)
    predicted = cost.estimate(plan, parameters, "float32")
    measured = apart(run, str(folder), str(folder.parent / f"{name}-{job}".replace(" ", "-")), values)
    healing = predicted["steps"]["healing"]["seconds"]
    return {
        "shape": name,
        "job": job,
        "folding": {"predicted": predicted["seconds"] - healing, "measured": measured["spent"]["folding"]},
        "healing": {"predicted": healing, "measured": measured["spent"]["healing"]},
        "peak": {"predicted": peak(predicted["bytes"]), "measured": measured["peak_memory_bytes"]},
        "spent": measured["spent"],
        "steps": predicted["steps"],
        "operations_per_second": predicted["operations_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--publish", action="store_true", help="keep the results in docs/results/cost.json")
    args = parser.parse_args()
    hold_memory()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.shapes:
            folder = made(Path(scratch) / name, SHAPES[name])
            for job in JOBS:
                found.append(compared(name, job, folder))
                print(json.dumps(found[-1]), flush=True)
    if args.publish:
        (RESULTS / "cost.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
