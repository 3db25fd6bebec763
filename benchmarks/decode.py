"""Decoding speed and resident cache of our own layout against multi-head attention, over the context, in transformers.

    python benchmarks/decode.py [SOURCE OUT …] [--batch 8] [--contexts 512 1024 …] [--device cpu] [--out DIR] [--keep]

A Llama of about 110M parameters (12 layers, 12 heads of 64) and its foldings at a quarter of the cache, of random weights:
MLA 320 + 64, without and with keys that turn whole, MFA 192, MFA-KR 384 and rebuilt keys 384; or checkpoints, the source
first. The cache is filled to the context, then tokens are decoded one at a time through transformers' default cache;
models take turns, and the fastest of the repeats counts. Writes decode.json, decode.md and decode.png into DIR and prints the
table. `--keep` puts the results into docs/results and the plot into docs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from kvfold.convert.layouts.modeling_kvfold import KvfoldConfig
from kvfold.evaluation.layers import cached_tensors

SHAPE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
}
DOCS = Path(__file__).parent.parent / "docs"
FOLDS: dict[str, dict[str, Any]] = {
    "MLA 320 + 64": {"design": "latent", "rank": 320, "rope_dim": 64, "nope_dim": 64},
    "MLA 320 + 64, 3 turned": {"design": "latent", "rank": 320, "rope_dim": 64, "nope_dim": 64, "turned": 3},
    "MFA 192": {"design": "latent", "rank": 192, "rope_dim": 192, "nope_dim": 0},
    "MFA-KR 384": {"design": "reused-key", "rope_dim": 384},
    "rebuilt keys 384": {"design": "rebuilt-key", "rank": 384, "kv_heads": 12},
}


def models(
    device: str, dtype: torch.dtype, shape: dict[str, Any] = SHAPE, folds: dict[str, dict[str, Any]] = FOLDS
) -> dict[str, PreTrainedModel]:
    """A Llama of random weights and its folds."""
    torch.manual_seed(0)
    with torch.device(device):
        found: dict[str, PreTrainedModel] = {"source": AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)}
        for name, widths in folds.items():
            layer = {**widths, "heads": shape["num_attention_heads"], "value_dim": shape["head_dim"]}
            layers = {"folded_layers": [layer] * shape["num_hidden_layers"]}
            config = KvfoldConfig.from_dict({**shape, "source_model_type": "llama", **layers})
            found[name] = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return {name: model.to(device, dtype).eval() for name, model in found.items()}


@torch.no_grad()
def decode(model: PreTrainedModel, context: int, batch: int, steps: int) -> tuple[float, int]:
    """Seconds per step after `context` tokens, and bytes of the cache then."""
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    model(token, past_key_values=cache, use_cache=True)
    for layer in cache.layers:  # as many tokens as asked for, without running the prompt
        layer.keys, layer.values = (torch.randn_like(t.expand(-1, -1, context, -1)) for t in (layer.keys, layer.values))
    model(token, past_key_values=cache, use_cache=True)  # warm-up
    if token.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        model(token, past_key_values=cache, use_cache=True)
    if token.is_cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / steps
    return seconds, sum(t.nbytes for t in cached_tensors(cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--without", nargs="*", default=[], help="models to leave out: rebuilt keys take minutes from 4k on")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--keep", action="store_true", help="put the results into docs/results/decode.json")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.checkpoints:
        built: dict[str, PreTrainedModel] = {
            path.name: AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device).eval()
            for path in args.checkpoints
        }
    else:
        built = models(args.device, dtype)
    built = {name: model for name, model in built.items() if name not in args.without}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in built}
    source = next(iter(found.values()))
    for context in args.contexts:
        runs: dict[str, list[tuple[float, int]]] = {name: [] for name in built}
        for _ in range(args.repeats):
            for name, model in built.items():
                runs[name].append(decode(model, context, args.batch, args.steps))
        for name, ran in runs.items():
            seconds, size = min(ran)
            found[name].append({"context": context, "tokens_per_second": args.batch / seconds, "cache_mib": size / 2**20})
            found[name][-1]["times_source"] = found[name][-1]["tokens_per_second"] / source[-1]["tokens_per_second"]
        print(context, {name: f"{rows[-1]['tokens_per_second']:.1f}" for name, rows in found.items()}, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"batch": args.batch, "device": args.device, "dtype": args.dtype, "threads": torch.get_num_threads()}
    data, text = json.dumps({"settings": settings, **found}, indent=1) + "\n", table(found, args.contexts)
    (args.out / "decode.json").write_text(data)
    (args.out / "decode.md").write_text(text)
    plot(found, args.batch, args.out / "decode.png")
    if args.keep:
        (DOCS / "results/decode.json").write_text(data)
        plot(found, args.batch, DOCS / "decode.png")
    print(text)


def table(found: dict[str, list[dict[str, float]]], contexts: list[int]) -> str:
    """Tokens per second and their ratio to the source's, one row for a model."""
    lines = [
        "| | cache at the end | " + " | ".join(f"{c:,}" for c in contexts) + " |",
        "|---|---:" + "|---:" * len(contexts) + "|",
    ]
    for name, rows in found.items():
        speeds = [f"{row['tokens_per_second']:.1f} ({row['times_source']:.2f}×)" for row in rows]
        lines.append(f"| {name} | {rows[-1]['cache_mib']:,.0f} MiB | " + " | ".join(speeds) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[dict[str, float]]], batch: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    contexts = [row["context"] for row in next(iter(found.values()))]
    for name, rows in found.items():
        speed.plot(contexts, [row["tokens_per_second"] for row in rows], marker="o", label=name)
        memory.plot(contexts, [row["cache_mib"] for row in rows], marker="o", label=name)
    for axes, quantity in ((speed, "tokens per second"), (memory, "cache, MiB")):
        axes.set(xscale="log", yscale="log", xlabel=f"context, tokens (batch {batch})", ylabel=quantity)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
