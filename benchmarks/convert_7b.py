"""Time and memory of a data-free conversion of a 7B-shaped checkpoint, against `cp -r` of the same folder.

    python benchmarks/convert_7b.py [DIR] [--layers 32] [--repeats 2]

Makes a random bf16 Llama of Llama-2-7B's shape (13 GB) in DIR, copies it with `cp -r` and folds it with
`kvfold convert --to gqa --kv-heads 8 --method mean`, in turns, each after a `sync`; prints wall seconds, their ratio and the
peak resident memory of the conversion, and removes everything again. Needs 27 GB of free disk.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        size = make_checkpoint(source, args.layers)
        fold = [sys.executable, "-m", "kvfold", "convert", str(source), str(out), "--to", "gqa", "--kv-heads", "8"]
        copies, folds = [], []
        for _ in range(args.repeats):
            copies.append(timed(["cp", "-r", str(source), str(out)]))
            shutil.rmtree(out)
            folds.append(timed([*fold, "--method", "mean"]))
            shutil.rmtree(out)
    # cp's own memory is a few MiB, so the largest child is the conversion
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"checkpoint {size / 1e9:.1f} GB, {args.layers} layers")
    print(f"cp -r   {', '.join(f'{s:.1f}' for s in copies)} s")
    print(f"kvfold  {', '.join(f'{s:.1f}' for s in folds)} s, peak resident {peak:.2f} GiB")
    print(f"ratio   {sum(folds) / sum(copies):.2f} (must be at most 2; memory at most 2 GiB)")


if __name__ == "__main__":
    main()
