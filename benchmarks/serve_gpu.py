"""A prompt, and one decoding step, of one attention layer on a GPU: the source's grouped attention against latents in pages.

    python benchmarks/serve_gpu.py [--contexts 1024 8192 32768] [--batches 1 8 64] [--out FILE.json] [--tune FOLD…]

A layer of an 8B Llama (hidden 4096, 32 query and 8 key heads of 128) in bfloat16, of random numbers. The source attends by
torch's scaled_dot_product_attention over a contiguous cache; MLA, MFA and MFA-KR by kvfold's Triton kernel and by PyTorch's
operations over pages of 16 tokens in disorder. `attention` is the time from queries to mixed values, `layer` that from hidden
states to the output projection, projections and writing the cache included. Both are replayed from CUDA graphs, over several
layers where one would fit the processor's cache, and medians are printed in microseconds. `prompt` is the layer's share of the
time to the first token of one request, in milliseconds: the source's whole prompt at once, a fold's 2,048 tokens at a time, as
an engine cuts it, by PyTorch's operations. `--tune` tries other tiles of the kernel for some folds as well. Needs torch and
Triton, and `PYTHONPATH=src` where kvfold is not installed.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvfold.serving import latents, paged, selfcheck
from kvfold.surgery.kvfold_attention import DESIGNS, FoldedAttention, Rope, per_head, rotate

PAGE, COLD = 16, 128 * 2**20
"""Tokens in a page; numbers of cache that layers read in turn, so that none is in the processor's own."""
PIECE = 2048
"""Tokens of a prompt that go through a folded layer at a time."""
TILES = [(16, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 3), (16, 32, 4, 2), (16, 32, 4, 5), (16, 32, 8, 1), (16, 32, 8, 3)]
TILES += [(16, 32, 16, 2), (16, 64, 8, 3), (32, 32, 8, 3), (32, 64, 8, 3)]
"""Heads, tokens, warps and stages that `--tune` tries."""


@dataclass(frozen=True)
class Size:
    """The source's layer and what it is folded into."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    folds: dict[str, tuple[str, dict[str, int]]] = field(
        default_factory=lambda: {
            "MLA 512 + 64": ("latent", {"rank": 512, "rope_dim": 64, "nope_dim": 128}),
            "MLA 512 + 64, 3 turned": ("latent", {"rank": 512, "rope_dim": 64, "nope_dim": 128, "turned": 3}),
            "MFA 256": ("latent", {"rank": 256, "rope_dim": 256, "nope_dim": 0}),
            "MFA-KR 512": ("reused-key", {"rope_dim": 512}),
        }
    )


class Rotary(nn.Module):
    """As transformers' rotary modules are called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = 5e5 ** -torch.linspace(0, 1, width // 2)

    def forward(self, x: Tensor, positions: Tensor) -> Rope:
        angles = positions[..., None] * self.frequencies.to(x.device)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Grouped(nn.Module):
    """The source's attention, one new token after a contiguous cache."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.width = size.width
        self.q_proj = nn.Linear(size.hidden, size.heads * size.width, bias=False)
        self.kv_proj = nn.Linear(size.hidden, 2 * size.kv_heads * size.width, bias=False)
        self.o_proj = nn.Linear(size.heads * size.width, size.hidden, bias=False)

    def states(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d), tables (B, T, D) → queries (B, H, T, D), keys and values (B, G, T, D)."""
        k, v = per_head(self.kv_proj(x), self.width).chunk(2, 1)
        return rotate(per_head(self.q_proj(x), self.width), rope), rotate(k, rope), v

    def forward(self, x: Tensor, rope: Rope, cache: Tensor) -> Tensor:
        """x (B, d), cache (2, B, G, S, D) → (B, d)."""
        q, cache[0, :, :, -1:], cache[1, :, :, -1:] = self.states(x[:, None], (rope[0][:, None], rope[1][:, None]))
        return self.o_proj(grouped(q, cache).transpose(1, 2).flatten(1))

    def prompt(self, x: Tensor, rope: Rope) -> Tensor:
        """(T, d) → (T, d), all at once."""
        q, k, v = self.states(x[None], (rope[0][None], rope[1][None]))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))[0]


def grouped(q: Tensor, cache: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True)


class Cell:
    """One context and batch: what is timed, over as many layers as keep caches out of the processor's own."""

    def __init__(self, size: Size, context: int, batch: int, numbers: Tensor) -> None:
        self.size, self.context, self.batch, self.numbers = size, context, batch, numbers
        self.device, self.dtype = numbers.device, numbers.dtype
        self.x = numbers[: batch * size.hidden].view(batch, size.hidden)
        last = torch.full((batch,), context - 1, device=self.device)
        self.rotary = Rotary(size.width)
        self.rope = self.rotary(self.x, last)
        columns = -(-context // PAGE)
        self.pages = batch * columns
        self.table = torch.randperm(self.pages, device=self.device).view(batch, columns).int()
        slots = self.table[:, -1].long() * PAGE + (context - 1) % PAGE
        self.step = paged.Step(list(range(batch + 1)), [context] * batch, self.table, slots)
        self.lengths = (last + 1).int()

    def caches(self, *shape: int) -> list[Tensor]:
        """Layers' caches of this shape, views of the same numbers."""
        count = torch.Size(shape).numel()
        room = min(len(self.numbers) // count, max(1, -(-COLD // count)), 8)
        return [self.numbers[n * count : (n + 1) * count].view(shape) for n in range(room)]

    def source(self) -> dict[str, float]:
        caches = self.caches(2, self.batch, self.size.kv_heads, self.context, self.size.width)
        with self.device:
            layers = [Grouped(self.size).to(self.dtype) for _ in caches]
        q = self.numbers[: self.batch * self.size.heads * self.size.width].view(self.batch, self.size.heads, 1, self.size.width)
        return {
            "attention": self.timed([lambda c=cache: grouped(q, c) for cache in caches]),
            "layer": self.timed([lambda m=m, c=c: m(self.x, self.rope, c) for m, c in zip(layers, caches, strict=True)]),
        }

    def pages_of(self, name: str) -> list[Tensor]:
        """Layers' pages."""
        widths = self.size.folds[name][1]
        return self.caches(self.pages, PAGE, widths.get("rank", 0) + widths["rope_dim"])

    def layer(self, name: str) -> FoldedAttention:
        design, widths = self.size.folds[name]
        with self.device:  # layers of this size take a second each to fill on a CPU
            made = DESIGNS[design](self.size.hidden, heads=self.size.heads, value_dim=self.size.width, **widths)
        made.rotary_emb = self.rotary
        return made.to(self.dtype)

    def folded(self, name: str, kernel: bool) -> dict[str, float]:
        caches = self.pages_of(name)
        layers = [paged.Layer(self.layer(name)) for _ in caches]
        with choice(kernel):
            found = {
                "layer": self.timed(
                    [
                        lambda m=m, c=c: m.attention.o_proj(m.attend(self.x, self.rope, c, self.step))
                        for m, c in zip(layers, caches, strict=True)
                    ]
                )
            }
            chosen = layers[0].kernel(PAGE, self.dtype, self.device)
            if chosen is not None:
                case = [self.case(layer, cache) for layer, cache in zip(layers, caches, strict=True)]
                found["attention"] = self.timed([lambda c=c: chosen(*c) for c in case])
            elif kernel and self.device.type == "cuda":
                raise SystemExit(f"the kernel does not serve {name}: see the line above")
        return found

    def prompt(self, name: str | None) -> float:
        """Milliseconds of a prompt of `context` tokens in a fold, None for the source."""
        x, places = self.numbers[: self.context * self.size.hidden].view(self.context, -1), torch.arange(self.context)
        cos, sin = self.rotary(x, places.to(self.device))
        if name is None:
            with self.device:
                source = Grouped(self.size).to(self.dtype)
            return self.waited(lambda: source.prompt(x, (cos, sin)))
        layer, pages = paged.Layer(self.layer(name)), self.pages_of(name)[0].clone()
        slots = self.table[0].long().repeat_interleave(PAGE)[: self.context] * PAGE + places.to(self.device) % PAGE

        def run() -> None:
            for piece in places.split(PIECE):
                part = slice(int(piece[0]), int(piece[-1]) + 1)
                step = paged.Step([0, len(piece)], [part.stop], self.table[:1], slots[part])
                layer.attention.o_proj(layer.attend(x[part], (cos[part], sin[part]), pages, step))

        return self.waited(run)

    def waited(self, run: Callable[[], Any]) -> float:
        """Milliseconds of the faster of two runs, behind one that is not counted."""

        def whole() -> None:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return 1e3 * min([_seconds(whole) for _ in range(3)][1:])

    def case(self, layer: paged.Layer, cache: Tensor) -> tuple[latents.Shape, latents.Asked, latents.Cached]:
        """What the kernel is given in a step of this layer."""
        found: list[Any] = []

        def kept(shape: latents.Shape, asked: latents.Asked, cached: latents.Cached) -> Tensor:
            found.extend((shape, asked, cached))
            return cache.new_zeros(self.batch, shape.heads, shape.values)

        assert layer.shape is not None
        angles, pairs = latents.tables(layer.attention, self.context, cache)
        cached = latents.Cached(cache, self.table, self.lengths, self.context, None, angles, pairs)
        latents.decode(layer.attention, layer.shape, self.x, self.rope, cached, kept)
        return found[0], found[1], found[2]

    def timed(self, runs: list[Callable[[], Any]]) -> float:
        """Median microseconds of one of several alike."""
        if self.device.type != "cuda":
            return median(_seconds(run) for run in runs for _ in range(3)) * 1e6
        from triton.testing import do_bench

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return do_bench(graph.replay, warmup=5, rep=30, return_mode="median") / len(runs) * 1e3


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@contextmanager
def choice(kernel: bool) -> Any:
    """With the kernel where it serves, or without it."""
    kept = selfcheck.kernel
    if not kernel:
        selfcheck.kernel = lambda *_: None
    try:
        yield
    finally:
        selfcheck.kernel = kept


@torch.no_grad()
def measure(size: Size, contexts: list[int], batches: list[int], device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for every context and batch: microseconds of the source, and of each fold by the kernel and by PyTorch."""
    most = max(contexts) * max(batches) * 2 * size.kv_heads * size.width
    numbers = torch.empty(max(most, max(batches) * size.hidden, COLD), device=device, dtype=dtype).normal_()
    found = []
    for context, batch in itertools.product(contexts, batches):
        cell = Cell(size, context, batch, numbers)
        row: dict[str, Any] = {"context": context, "batch": batch, "source": cell.source()}
        for name in size.folds:
            row[name] = {"PyTorch": cell.folded(name, kernel=False)}
            if device.startswith("cuda"):
                row[name]["kernel"] = cell.folded(name, kernel=True)
        if batch == 1:
            row["prompt"] = {name or "source": cell.prompt(name) for name in (None, *size.folds)}
        print(line(row), flush=True)
        found.append(row)
    return found


def line(row: dict[str, Any]) -> str:
    """Of a table: microseconds of the source's attention and layer, and of every fold's, with how much faster its layer is."""
    cells = [f"{row['context']:,}", str(row["batch"]), f"{row['source']['attention']:.0f}, {row['source']['layer']:.0f}"]
    for name, ways in row.items():
        if name in ("context", "batch", "source", "prompt"):
            continue
        best = ways.get("kernel", ways["PyTorch"])
        attention = f"{best['attention']:.0f}, " if "attention" in best else ""
        faster = row["source"]["layer"] / best["layer"]
        slow = f"; {ways['PyTorch']['layer']:.0f}" if "kernel" in ways else ""
        cells.append(f"{attention}{best['layer']:.0f} ({faster:.2f}×{slow})")
    prompts = ", ".join(f"{name} {ms:.2f}" for name, ms in row.get("prompt", {}).items())
    return f"| {' | '.join(cells)} |" + (f"  prompt, ms: {prompts}" if prompts else "")


@torch.no_grad()
def tune(size: Size, folds: list[str], context: int, batch: int) -> list[dict[str, Any]]:
    """Microseconds of the kernel's attention with other tiles."""
    from triton import OutOfResources

    from kvfold.serving.kernel import Tiles, attend

    numbers = torch.randn(max(COLD, context * batch * 600), device="cuda", dtype=torch.bfloat16)
    cell, found = Cell(size, context, batch, numbers), []
    for name in folds:
        layer = paged.Layer(cell.layer(name))
        cases = [cell.case(layer, cache) for cache in cell.pages_of(name)]
        for tiles in TILES:
            for programs in (1, 2, 4):
                cut = Tiles(*tiles, programs)
                try:
                    took = cell.timed([lambda c=case, t=cut: attend(*c, cut=t) for case in cases])
                except OutOfResources:
                    continue
                found.append({"fold": name, "context": context, "batch": batch, **asdict(cut), "microseconds": took})
                print(name, context, batch, tiles, programs, f"{took:.1f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tune", nargs="+", default=[], choices=Size().folds, metavar="FOLD")
    args = parser.parse_args()
    size = Size()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: microseconds of attention, layer (layer against the source's; layer by PyTorch)")
    print(f"| context | batch | source | {' | '.join(size.folds)} |\n|---:|---:|{'---|' * (1 + len(size.folds))}")
    found: dict[str, Any] = {"device": name, "torch": torch.__version__}
    found["rows"] = measure(size, args.contexts, args.batches, "cuda", torch.bfloat16)
    if args.tune:
        found["tiles"] = [row for batch in (8, 64) for row in tune(size, args.tune, 8192, batch)]
    text = json.dumps(found, indent=1)
    print(json.dumps(found))
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
