"""What a GPU does: conversions of the shapes that people have, uptraining, and decoding of the own layout, in one command.

    python benchmarks/gpu.py [convert] [uptrain] [decode] [--layers 4] [--small] [--publish]

Checkpoints of a few layers of random bfloat16 weights stand for an 8B with 8 key heads and a 7B with 32: each is converted to
MLA, MFA and GQA at a quarter of the cache on 131,072 random tokens with the default healing, and the seconds of each step are
those of its layers. A Llama of a billion parameters is uptrained with and without its teacher, and the 8B's layers and their
foldings decode one token at a time behind contexts of 4k to 128k. About twenty minutes of one H100; fewer --layers take less.

Prints a table, and with --publish keeps the results in docs/results/gpu.json. --small is the same in miniature, on any device.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import decode
import torch
from cost import made, run
from results import RESULTS

import kvfold
from kvfold.convert.planning import speed
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings, parse_settings
from kvfold.convert.source.configfile import read_config
from kvfold.errors import NothingGained
from kvfold.recipes.recipe import load_recipe
from kvfold.recipes.uptrain import uptrain

Json = dict[str, Any]
CUDA = torch.cuda.is_available()
WIDE = {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128}
SHAPES: dict[str, Json] = {
    "8B, 8 key heads": {**WIDE, "intermediate_size": 14336, "num_key_value_heads": 8},
    "7B, 32 key heads": {**WIDE, "intermediate_size": 11008, "num_key_value_heads": 32},
}
DEPTH = 32
"""Layers of the models whose shapes these are. All windows of healing but the last are of two layers."""
BILLION: Json = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
}
TINY: Json = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
JOBS: dict[str, Json] = {
    "mla": {"to": "mla", "kv_budget": "25%"},
    "mla, own layout": {"to": "mla", "kv_budget": "25%", "layout": "kvfold"},
    "mfa": {"to": "mfa", "kv_budget": "25%"},
    "gqa": {"to": "gqa", "kv_budget": "25%"},
}
STEPS, WINDOW, BATCH = 24, 1024, 16
"""Of a timed uptraining; the first third is not counted."""
FOLDS: dict[str, Json] = {
    "MLA 448 + 64": {"design": "latent", "rank": 448, "rope_dim": 64, "nope_dim": 128},
    "MLA 504 + 8, 3 turned keys": {"design": "latent", "rank": 504, "rope_dim": 8, "nope_dim": 128, "turned": 3},
    "MFA 256": {"design": "latent", "rank": 256, "rope_dim": 256, "nope_dim": 0},
    "MFA-KR 512": {"design": "reused-key", "rope_dim": 512},
}
NAMES = ("what", "shape", "job", "recipe", "model", "context", "batch")
"""What tells results apart."""
PLACES = ((4096, 1), (4096, 16), (32768, 1), (32768, 16), (131072, 1), (131072, 4))
"""Contexts and batches of the decoding."""


def conversions(scratch: Path, shapes: dict[str, Json], tokens: int, steps: int, device: str) -> Iterator[Json]:
    """Seconds by step of every job on every shape."""
    for name, shape in shapes.items():
        source = made(scratch / name.replace(" ", "-").replace(",", ""), shape, tokens, "bfloat16")
        for job, values in JOBS.items():
            out = source.with_name(f"{source.name}-{job}".replace(" ", "-"))
            values = {**values, "calibrate": f"{source}/text.safetensors:text", "calibration_tokens": tokens}
            values |= {"heal_steps": steps, "heal_window": 2, "device": device}
            fresh_peak()
            spent = run(str(source), str(out), values, "wall")["spent"]
            record = json.loads((out / "kvfold.json").read_text())
            layers = shape["num_hidden_layers"]
            healing = spent.get("healing", 0.0) * (2 * DEPTH - 1) / (2 * layers - 1)  # of the whole model
            yield {
                "what": "convert",
                "shape": name,
                "job": job,
                "layers": layers,
                "calibration_tokens": tokens,
                "heal_steps": steps,
                "folding_seconds_per_layer": spent["folding"] / layers,
                "healing_seconds_per_layer": healing / DEPTH,
                "other_seconds": spent.get("reading", 0.0) + spent.get("verifying", 0.0),
                "peak_device_gib": record.get("peak_cuda_memory_bytes", 0) / 2**30,
                "block_errors": [layer["block_error"] for layer in record["layers"]],
                "whole_model_minutes": (DEPTH * spent["folding"] / layers + healing) / 60,
            }


def uptrainings(scratch: Path, shape: Json, device: str) -> Iterator[Json]:
    """Tokens per second of each recipe on a fold of one shape."""
    window = WINDOW if shape is BILLION else 32
    source = made(scratch / "billion", shape, 1 << 17, "bfloat16", window)
    folded = source.with_name("billion-folded")
    few = {"calibrate": f"{source}/text.safetensors:text", "calibration_tokens": 8 * window, "window": window, "heal_steps": 0}
    run(str(source), str(folded), {**JOBS["mla, own layout"], **few, "device": device})
    for recipe in ("distill-lora", "distill-attention", "ce-lora"):
        pairs = [f"tokens={STEPS * BATCH * window}", f"window={window}", f"batch={BATCH}", f"micro_batch={BATCH}", "bf16=true"]
        pairs += ["log_every=1", "eval_every=1000", f"eval_tokens={BATCH * window}", f"device={device}", "learning_rate=1e-5"]
        out = source.with_name(f"billion-{recipe}")
        found = trained(str(folded), out, str(source), recipe, pairs, f"{source}/text.safetensors:text")
        yield {"what": "uptrain", "recipe": recipe, "window": window, "batch": BATCH, **found}


def trained(folded: str, out: Path, source: str, recipe: str, pairs: list[str], data: str) -> Json:
    """Tokens per second and the device's peak memory; no rate makes anything better on random text, and none is kept."""
    settings, seen = load_recipe(recipe, pairs), {}

    def log(line: str) -> None:
        if line.startswith("step ") and "held-out" not in line:
            seen[int(line.split()[1].split("/")[0])] = time.perf_counter()

    fresh_peak()
    with suppress(NothingGained):
        uptrain(folded, out, source if settings.kl_weight else None, settings, data, log=log)
    first, last = min(seen) + STEPS // 3, max(seen)
    rate = (last - first) * settings.batch * settings.window / (seen[last] - seen[first])
    return {"tokens_per_second": rate, "peak_device_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0}


def fresh_peak() -> None:
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def decodings(shape: Json, places: Any, folds: dict[str, Json], device: str, steps: int) -> Iterator[Json]:
    """Milliseconds of a step and bytes of the cache, of the source and its folds."""
    held = decode.models(device, torch.bfloat16, shape, folds)
    for context, batch in places:
        for name, model in held.items():
            found: Json = {
                "what": "decode",
                "model": name,
                "context": context,
                "batch": batch,
                "layers": shape["num_hidden_layers"],
            }
            try:
                seconds, size = min(decode.decode(model, context, batch, steps) for _ in range(2))
                each = 1e3 * seconds / found["layers"]
                yield {**found, "milliseconds": 1e3 * seconds, "milliseconds_per_layer": each, "cache_bytes": size}
            except torch.OutOfMemoryError:
                yield {**found, "milliseconds": None, "milliseconds_per_layer": None, "cache_bytes": None}
            fresh_peak()


def rates(source: Path, values: Json, device: str) -> Json:
    """What `plan --device` measures of this device."""
    plan = make_plan(read_config(source), parse_settings(ConvertSettings, {**values, "calibrate": "text"}))
    return {"what": "speed", "operations_per_second": speed.measured(plan, torch.device(device))}


def table(found: list[Json]) -> str:
    """The results as Markdown."""
    lines = []
    if rows := [r for r in found if r["what"] == "convert"]:
        lines += [
            "| shape | to | folding, s per layer | healing | peak of the device | whole model |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for r in rows:
            seconds = f"{r['folding_seconds_per_layer']:.1f} | {r['healing_seconds_per_layer']:.1f}"
            whole = f"{r['peak_device_gib']:.1f} GiB | {r['whole_model_minutes']:.1f} min"
            lines.append(f"| {r['shape']} | {r['job']} | {seconds} | {whole} |")
        lines.append("")
    if rows := [r for r in found if r["what"] == "uptrain"]:
        lines += ["| recipe | tokens per second | peak of the device |", "|---|---:|---:|"]
        for r in rows:
            lines.append(f"| `{r['recipe']}` | {r['tokens_per_second']:,.0f} | {r['peak_device_gib']:.1f} GiB |")
        lines.append("")
    if rows := [r for r in found if r["what"] == "decode"]:
        places = list(dict.fromkeys((r["context"], r["batch"]) for r in rows))
        lines += [
            "| ms per step and layer | " + " | ".join(f"{c:,} × {b}" for c, b in places) + " |",
            "|---" * (1 + len(places)) + "|",
        ]
        for name in dict.fromkeys(r["model"] for r in rows):
            times = [next(r for r in rows if (r["model"], r["context"], r["batch"]) == (name, *place)) for place in places]
            cells = [f"{r['milliseconds_per_layer']:.2f}" if r["milliseconds_per_layer"] else "none" for r in times]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measure(what: list[str], layers: int, small: bool, device: str) -> Iterator[Json]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "convert" in what:
            shapes = (
                {"tiny": TINY} if small else {name: {**shape, "num_hidden_layers": layers} for name, shape in SHAPES.items()}
            )
            yield rates(made(scratch / "rates", next(iter(shapes.values())), 512), JOBS["mla"], device)
            yield from conversions(scratch, shapes, 2048 if small else 131072, 4 if small else 300, device)
        if "uptrain" in what:
            yield from uptrainings(scratch, TINY if small else BILLION, device)
    if "decode" in what:
        if small:
            folds: dict[str, Json] = {
                "MLA 12 + 4": {"design": "latent", "rank": 12, "rope_dim": 4, "nope_dim": 16},
                "MFA 24": {"design": "latent", "rank": 24, "rope_dim": 24, "nope_dim": 0},
            }
            yield from decodings({**decode.SHAPE, **TINY}, ((64, 2),), folds, device, 2)
        else:
            shape = {**decode.SHAPE, **SHAPES["8B, 8 key heads"], "num_hidden_layers": layers, "vocab_size": 2048}
            yield from decodings({**shape, "max_position_embeddings": 1 << 18}, PLACES, FOLDS, device, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["convert", "uptrain", "decode"], help="convert, uptrain, decode")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="in miniature")
    parser.add_argument("--out", type=Path, help="also write the results into this file, one a line, as they come")
    parser.add_argument("--publish", action="store_true", help="keep the results in docs/results/gpu.json")
    args = parser.parse_args()
    device, name = ("cuda", torch.cuda.get_device_name()) if CUDA else ("cpu", "CPU")
    found: list[Json] = [{"what": "device", "device": name, "torch": torch.__version__, "kvfold": kvfold.__version__}]
    for result in measure(args.what, args.layers, args.small, device):
        found.append(result)
        print(json.dumps(result), flush=True)
        if args.out:
            args.out.write_text("".join(json.dumps(r) + "\n" for r in found))
    if args.publish:
        named = {", ".join(str(r[key]) for key in NAMES if key in r): r for r in found}
        (RESULTS / "gpu.json").write_text(json.dumps(named, indent=1) + "\n")
    print(f"{name}\n\n{table(found)}")


if __name__ == "__main__":
    main()
