"""Decoding over latents in pages in one pass, in Triton: `latents.attend` on CUDA devices.

Every request is cut into splits, which attend by themselves (flash decoding), and a second kernel weighs them by the logarithms
of their sums. Scores and sums are float32; products take their factors as they are cached, and float32 ones are exact.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.serving.latents import Asked, Cached, Shape


@dataclass(frozen=True)
class Tiles:
    """How the work is cut up: heads and tokens of a tile, warps, tiles on their way at once, programs on each processor."""

    heads: int
    tokens: int
    warps: int = 4
    stages: int = 2
    programs: int = 2


@triton.jit(do_not_specialize=["splits"])
def _attend(  # type: ignore[no-untyped-def]
    FIRST,
    SECOND,
    TURNED,
    PAGES,
    TABLE,
    LENGTHS,
    COS,
    SIN,
    PAIRS,
    OUT,
    SUMS,
    scale,
    cap,
    heads,
    window,
    page_stride,
    table_stride,
    angle_stride,
    splits,
    A: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ASKS_FIRST: tl.constexpr,
    ASKS_SECOND: tl.constexpr,
    HALVES: tl.constexpr,
    PAIR_COUNT: tl.constexpr,
    NUMBERS: tl.constexpr,
    WIDE: tl.constexpr,
    GAINS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_A: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_WIDE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    split, block, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    h = block * TILE_HEADS + tl.arange(0, TILE_HEADS)
    a, c, w = tl.arange(0, TILE_A), tl.arange(0, TILE_C), tl.arange(0, TILE_WIDE)
    in_h, in_a, in_c, in_w = h < heads, a < A, c < C, w < WIDE
    asker = request.to(tl.int64) * heads + h
    if ASKS_FIRST:
        q_first = tl.load(FIRST + asker[:, None] * A + a[None, :], mask=in_h[:, None] & in_a[None, :], other=0.0)
    if ASKS_SECOND:
        q_second = tl.load(SECOND + asker[:, None] * C + c[None, :], mask=in_h[:, None] & in_c[None, :], other=0.0)
    if HALVES:
        pair = tl.load(PAIRS + a, mask=in_a, other=PAIR_COUNT)
        turns = pair < PAIR_COUNT

    length = tl.load(LENGTHS + request)
    oldest = 0
    if WINDOWED:
        oldest = tl.maximum(length - window, 0)
    span = tl.cdiv(tl.cdiv(length - oldest, splits), TILE_TOKENS) * TILE_TOKENS
    start = oldest + split * span
    end = tl.minimum(start + span, length)

    top = tl.full([TILE_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_HEADS], tl.float32)
    mixed_first = tl.zeros([TILE_HEADS, TILE_A], tl.float32)
    if HALVES:
        mixed_second = tl.zeros([TILE_HEADS, TILE_C], tl.float32)
    for at in range(start, end, TILE_TOKENS):
        t = at + tl.arange(0, TILE_TOKENS)
        there = t < end
        page = tl.load(TABLE + request.to(tl.int64) * table_stride + t // PAGE, mask=there, other=0).to(tl.int64)
        row = PAGES + page * page_stride + (t % PAGE) * WIDTH
        k_first = tl.load(row[:, None] + a[None, :], mask=there[:, None] & in_a[None, :], other=0.0)
        v_first = k_first
        scores = tl.zeros([TILE_HEADS, TILE_TOKENS], tl.float32)
        if ASKS_SECOND:
            k_second = tl.load(row[:, None] + A + c[None, :], mask=there[:, None] & in_c[None, :], other=0.0)
            v_second = k_second
            if HALVES:
                angle = t[:, None] * angle_stride + pair[None, :]
                turning = there[:, None] & turns[None, :]
                cos = tl.load(COS + angle, mask=turning, other=1.0).to(tl.float32)
                sin = tl.load(SIN + angle, mask=turning, other=0.0).to(tl.float32)
                one, other = v_first.to(tl.float32), v_second.to(tl.float32)
                k_first = (one * cos - other * sin).to(v_first.dtype)
                k_second = (other * cos + one * sin).to(v_first.dtype)
            scores = tl.dot(q_second, tl.trans(k_second), acc=scores, input_precision=PRECISION)
        if ASKS_FIRST:
            scores = tl.dot(q_first, tl.trans(k_first), acc=scores, input_precision=PRECISION)
        if NUMBERS > 0:  # keys that turn whole: a sum over a constant and some numbers of the latent
            angle = t[:, None] * angle_stride + (w % (WIDE // 2))[None, :]
            asked = there[:, None] & in_w[None, :]
            turn = tl.where(
                (w < WIDE // 2)[None, :],
                tl.load(COS + angle, mask=asked, other=0.0),
                tl.load(SIN + angle, mask=asked, other=0.0),
            ).to(v_first.dtype)
            for j in tl.static_range(NUMBERS):
                q_turned = tl.load(
                    TURNED + (asker * NUMBERS + j)[:, None] * WIDE + w[None, :], mask=in_h[:, None] & in_w[None, :], other=0.0
                )
                number = tl.load(row + j - 1, mask=there & (j > 0), other=1.0).to(tl.float32)
                scores += tl.dot(q_turned, tl.trans(turn), input_precision=PRECISION) * number[None, :]
        scores *= scale
        if GAINS > 0:
            column = A + C + h // (heads // GAINS)
            scores *= tl.load(row[None, :] + column[:, None], mask=in_h[:, None] & there[None, :], other=0.0).to(tl.float32)
        if CAPPED:
            scores = cap * (2.0 / (1.0 + tl.exp(-2.0 * scores / cap)) - 1.0)  # cap · tanh(scores / cap)
        scores = tl.where(there[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        weights, fade = tl.exp(scores - highest[:, None]), tl.exp(top - highest)
        top, total = highest, total * fade + tl.sum(weights, 1)
        weights = weights.to(v_first.dtype)
        mixed_first = tl.dot(weights, v_first, acc=mixed_first * fade[:, None], input_precision=PRECISION)
        if HALVES:
            mixed_second = tl.dot(weights, v_second, acc=mixed_second * fade[:, None], input_precision=PRECISION)

    some = tl.where(total > 0, total, 1.0)  # a split of a short request may have nothing to read
    values = A
    if HALVES:
        values = A + C
    part = asker * splits + split
    out = OUT + part[:, None] * values
    tl.store(out + a[None, :], mixed_first / some[:, None], mask=in_h[:, None] & in_a[None, :])
    if HALVES:
        tl.store(out + A + c[None, :], mixed_second / some[:, None], mask=in_h[:, None] & in_c[None, :])
    tl.store(SUMS + part, top + tl.log(some), mask=in_h)


@triton.jit(do_not_specialize=["splits"])
def _merge(  # type: ignore[no-untyped-def]
    PARTS, SUMS, SINKS, OUT, heads, values, splits, HAS_SINKS: tl.constexpr, TILE: tl.constexpr, TILE_SPLITS: tl.constexpr
):
    asker, v, s = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, TILE_SPLITS)
    part = asker * splits
    top = tl.full([], float("-inf"), tl.float32)
    if HAS_SINKS:
        top = tl.load(SINKS + asker % heads).to(tl.float32)
    sink = top
    for at in range(0, splits, TILE_SPLITS):
        top = tl.maximum(top, tl.max(tl.load(SUMS + part + at + s, mask=at + s < splits, other=float("-inf")), 0))
    total, mixed = tl.exp(sink - top), tl.zeros([TILE], tl.float32)  # no sink is one of no weight
    for at in range(0, splits, TILE_SPLITS):
        there = at + s < splits
        weights = tl.exp(tl.load(SUMS + part + at + s, mask=there, other=float("-inf")) - top)
        row = PARTS + (part + at + s)[:, None] * values + v[None, :]
        total += tl.sum(weights, 0)
        mixed += tl.sum(weights[:, None] * tl.load(row, mask=there[:, None] & (v < values)[None, :], other=0.0), 0)
    tl.store(OUT + asker * values + v, mixed / total, mask=v < values)


def tile(width: int) -> int:
    """The power of two that holds so many numbers; a matrix product takes 16 at least."""
    return max(16, triton.next_power_of_2(width))


def tiles(shape: Shape, size: int) -> Tiles | None:
    """What fits a processor's registers and shared memory, numbers being `size` bytes; None for widths that no tile holds."""
    width = (tile(shape.first) + tile(shape.second)) * size
    if width > 4608:
        return None
    if size > 2:
        return Tiles(16, 16, warps=8, stages=1)
    if width <= 512:
        return Tiles(16, 64, warps=4, stages=3)
    if width <= 1280 and not shape.halves:
        return Tiles(16, 32, warps=4, stages=3 if shape.numbers else 5)
    return Tiles(16, 32, warps=8, stages=3)


def attend(shape: Shape, asked: Asked, cached: Cached, splits: int | None = None, cut: Tiles | None = None) -> Tensor:
    """As `latents.attend`, in one pass over the cache.

    Args:
        splits: into how many parts each request is cut; None for what fills the device.
        cut: how the work is cut up; None for `tiles`.

    Raises:
        ValueError: No tile holds these widths.
    """
    pages, heads, values = cached.pages, shape.heads, shape.values
    cut = cut or tiles(shape, pages.element_size())
    if cut is None:
        raise ValueError(f"no tile of the kernel holds {shape.first} + {shape.second} numbers of {pages.dtype}")
    requests, blocks = len(cached.lengths), triton.cdiv(heads, cut.heads)
    splits = splits or max(
        1, min(room(pages.device) * cut.programs // (requests * blocks), triton.cdiv(cached.longest, 2 * cut.tokens))
    )
    whole = splits == 1 and asked.sinks is None
    parts = pages.new_empty(requests, heads, splits, values, dtype=pages.dtype if whole else torch.float32)
    sums = pages.new_empty(requests, heads, splits, dtype=torch.float32)
    cos, sin = cached.angles or (sums, sums)
    _attend[(splits, blocks, requests)](
        *(None if queries is None else queries.to(pages.dtype).contiguous() for queries in (asked.first, asked.second)),
        None if asked.turned is None else asked.turned.to(pages.dtype).contiguous(),
        pages,
        cached.table,
        cached.lengths,
        cos,
        sin,
        cached.pairs,
        parts,
        sums,
        asked.scale,
        shape.cap or 1.0,
        heads,
        cached.window or 0,
        pages.stride(0),
        cached.table.stride(0),
        cos.stride(0),
        splits,
        A=shape.first,
        C=shape.second,
        WIDTH=pages.stride(1),
        PAGE=pages.shape[1],
        ASKS_FIRST=asked.first is not None,
        ASKS_SECOND=asked.second is not None,
        HALVES=shape.halves,
        PAIR_COUNT=cos.shape[-1] // 2,
        NUMBERS=shape.numbers,
        WIDE=shape.wide,
        GAINS=shape.gains,
        CAPPED=shape.cap is not None,
        WINDOWED=cached.window is not None,
        PRECISION="ieee",
        TILE_A=tile(shape.first),
        TILE_C=tile(shape.second),
        TILE_WIDE=tile(shape.wide),
        TILE_HEADS=cut.heads,
        TILE_TOKENS=cut.tokens,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if whole:
        return parts[:, :, 0]
    out = pages.new_empty(requests, heads, values)
    _merge[(requests * heads, triton.cdiv(values, 64))](
        parts,
        sums,
        asked.sinks,
        out,
        heads,
        values,
        splits,
        HAS_SINKS=asked.sinks is not None,
        TILE=64,
        TILE_SPLITS=32,
    )
    return out


def room(device: torch.device) -> int:
    """How many processors the device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
