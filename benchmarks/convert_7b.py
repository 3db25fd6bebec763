"""Time and memory of a data-free conversion of a 7B-shaped checkpoint, against `cp -r` of the same folder.

    python benchmarks/convert_7b.py [DIR] [--layers 32] [--repeats 2] [--keep]

Makes a random bf16 Llama of Llama-2-7B's shape (13 GB) in DIR, copies it with `cp -r`, which leaves for later what fits into
memory, and with a `sync` behind that, and folds it with `kvfold convert --to gqa --kv-heads 8 --method mean`, whose result is
on the disk; in turns, each after a `sync`. Prints wall seconds, their ratios and the peak resident memory of the conversion,
and removes everything again. `--keep` puts the numbers into docs/results/convert-7b.json. Needs 27 GB of free disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

KEPT = Path(__file__).parent.parent / "docs/results/convert-7b.json"
FOLD = ("--to", "gqa", "--kv-heads", "8", "--method", "mean")
HIDDEN, INTERMEDIATE, HEADS, VOCAB = 4096, 11008, 32, 32000


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write the checkpoint, one shard a layer, and return its bytes."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    attention = {f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
    mlp = {f"mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
    norms = {f"{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
    block = {**attention, **mlp, "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE), **norms}
    shards = [{f"model.layers.{i}.{name}": shape for name, shape in block.items()} for i in range(layers)]
    table = (VOCAB, HIDDEN)
    shards.append({"model.embed_tokens.weight": table, "model.norm.weight": (HIDDEN,), "lm_head.weight": table})
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for n, shape in shapes.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def timed(command: list[str]) -> float:
    os.sync()
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="put the numbers into docs/results/convert-7b.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        size = make_checkpoint(source, args.layers)
        fold = [sys.executable, "-m", "kvfold", "convert", str(source), str(out), *FOLD]
        copies, written, folds, peaks = [], [], [], []
        for _ in range(args.repeats):
            copies.append(timed(["cp", "-r", str(source), str(out)]))
            shutil.rmtree(out)
            written.append(timed(["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(out)]))
            shutil.rmtree(out)
            folds.append(timed(fold))
            record = json.loads((out / "kvfold.json").read_text())
            peaks.append(record["peak_memory_bytes"] / 2**30)
            shutil.rmtree(out)
    ratio = sum(folds) / sum(copies)
    print(f"checkpoint {size / 1e9:.1f} GB, {args.layers} layers")
    print(f"cp -r   {', '.join(f'{s:.1f}' for s in copies)} s")
    print(f"and sync {', '.join(f'{s:.1f}' for s in written)} s, ratio {sum(folds) / sum(written):.2f}")
    print(f"kvfold  {', '.join(f'{s:.1f}' for s in folds)} s, peak resident {max(peaks):.2f} GiB")
    print(f"ratio   {ratio:.2f} (must be at most 1.5; memory at most 1.1 GiB)")
    if args.keep:
        kept = {
            "source": {"gigabytes": round(size / 1e9, 2), "layers": args.layers},
            "cp -r": {"seconds": [round(s, 1) for s in copies]},
            "cp -r && sync": {
                "seconds": [round(s, 1) for s in written],
                "times_as_long": round(sum(folds) / sum(written), 3),
            },
            f"kvfold convert {' '.join(FOLD)}": {
                "seconds": [round(s, 1) for s in folds],
                "times_as_long": round(ratio, 3),
                "peak_resident_gib": round(max(peaks), 3),
                "kvfold": record["version"],
            },
        }
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
