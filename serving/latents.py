"""What requests that decode ask of their cached latents, as a kernel takes it, and the same in PyTorch. Torch alone.

Shapes: B requests with one new token each, H heads of width D, d the hidden size; W numbers cached per token, N tokens in a
page, S positions. A cached token is two pieces side by side, A and C wide, and behind them G scalars of a norm:

- MLA and MFA: the latent and the shared rotary key. Both are keys, and the latent is the value. MFA does not ask the latent.
- MFA-KR: the halves of the wide key, which turn with one another when they are keys, and are values as they lie there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.surgery.kvfold_attention import (
    FoldedAttention,
    LatentAttention,
    ReusedKeyAttention,
    Rope,
    by_head,
    pick,
    rotate,
)

SPAN = 1024
"""Tables of angles are made for so many positions at a time: they are used until requests outgrow them."""


@dataclass(frozen=True)
class Shape:
    """A layer, as far as a kernel sees it.

    Attributes:
        first, second, gains: A, C and G; `second` may be none.
        asks_first: whether the first piece is a key too.
        halves: whether the pieces turn with one another as keys, and are both values.
        numbers, wide: keys that turn whole are `wide`, a sum over one and the first `numbers - 1` numbers of the latent; 0 if
            there are none.
        cap: what soft-caps the scores, None for nothing.
        sinks: whether heads have scores beside those of their keys.
    """

    heads: int
    first: int
    second: int
    gains: int = 0
    asks_first: bool = True
    halves: bool = False
    numbers: int = 0
    wide: int = 0
    cap: float | None = None
    sinks: bool = False

    @property
    def values(self) -> int:
        """How much a head mixes of every token."""
        return self.first + self.second if self.halves else self.first


@dataclass(frozen=True)
class Asked:
    """Queries, one of each head of every request.

    Attributes:
        scale: what scores are multiplied by.
        first, second: (B, H, A) and (B, H, C) what reads the pieces; None for one that is not asked.
        turned: (B, H, numbers, wide) what reads a token's numbers times `[cos | sin]` (wide,) of its position.
        sinks: (H,)
    """

    scale: float
    first: Tensor | None
    second: Tensor | None
    turned: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Cached:
    """Where the tokens lie that requests read.

    Attributes:
        pages: (pages, N, W).
        table: (B, pages) int32, the pages of each request in the order of its tokens.
        lengths: (B,) int32, tokens of each, the new one included; `longest` of them at most.
        window: how many tokens a token sees, itself included; None for all.
        angles: tables (S, D) by position, half-split, where something turns when it is read.
        pairs: (C,) the frequencies by which the halves turn, D/2 for none.
    """

    pages: Tensor
    table: Tensor
    lengths: Tensor
    longest: int
    window: int | None = None
    angles: Rope | None = None
    pairs: Tensor | None = None


Attend = Callable[[Shape, Asked, Cached], Tensor]


def attend(shape: Shape, asked: Asked, cached: Cached) -> Tensor:
    """What the heads of every request mix of their values: (B, H, values)."""
    places, size = torch.arange(cached.longest, device=cached.pages.device), cached.pages.shape[1]
    there = places < cached.lengths[:, None]
    if cached.window is not None:
        there &= places >= cached.lengths[:, None] - cached.window
    pages = cached.table[:, places // size].long().where(there, 0)
    rows = cached.pages[pages, places % size].where(there[..., None], 0)  # (B, S, W)
    first, second, gains = rows.split([shape.first, shape.second, shape.gains], -1)
    values = torch.cat([first, second], -1) if shape.halves else first
    if shape.halves:
        first, second = _turned(first, second, cached)
    scores = rows.new_zeros(len(rows), shape.heads, cached.longest)
    for queries, keys in ((asked.first, first), (asked.second, second)):
        if queries is not None:
            scores = scores + queries @ keys.mT
    if asked.turned is not None and cached.angles is not None:
        turn = torch.cat([table[: cached.longest, : shape.wide // 2].to(rows) for table in cached.angles], -1)
        numbers = torch.cat([torch.ones_like(rows[..., :1]), rows[..., : shape.numbers - 1]], -1)
        scores = scores + torch.einsum("bhjn,sn,bsj->bhs", asked.turned, turn, numbers)
    scores = scores * asked.scale
    if shape.gains:
        scores = scores * gains.mT.repeat_interleave(shape.heads // shape.gains, 1)
    if shape.cap is not None:
        scores = shape.cap * (scores / shape.cap).tanh()
    scores = scores.masked_fill(~there[:, None], float("-inf"))
    if asked.sinks is not None:
        scores = torch.cat([scores, asked.sinks.to(scores)[:, None].expand(len(rows), -1, 1)], -1)
    return scores.softmax(-1)[..., : cached.longest] @ values


def _turned(first: Tensor, second: Tensor, cached: Cached) -> tuple[Tensor, Tensor]:
    """The halves (B, S, C) of wide keys at their positions."""
    assert cached.angles is not None and cached.pairs is not None
    cos, sin = (
        table[: cached.longest, : first.shape[-1]]
        for table in pick((cached.angles[0].to(first), cached.angles[1].to(first)), cached.pairs)
    )
    return first * cos - second * sin, second * cos + first * sin


def shape_of(attention: FoldedAttention) -> Shape | None:
    """None for a design whose keys and values are not read from what it caches as that lies there."""
    through: dict[str, Any] = {"gains": attention.gains, "cap": attention.cap, "sinks": attention.sinks is not None}
    heads = attention.o_proj.in_features // attention.value_dim
    if isinstance(attention, LatentAttention):
        wide = attention.nope if attention.turned else 0
        asks, numbers = attention.nope > 0, attention.turned
        return Shape(heads, attention.rank, attention.rope_dim, asks_first=asks, numbers=numbers, wide=wide, **through)
    if isinstance(attention, ReusedKeyAttention):
        half = len(attention.rope_pairs)
        return Shape(heads, half, half, halves=True, **through)
    return None


def tables(attention: FoldedAttention, longest: int, like: Tensor) -> tuple[Rope | None, Tensor | None]:
    """`angles` and `pairs` of `Cached`."""
    if not attention.turns_when_read:
        return None, None
    cos, sin = attention.tables(like.new_empty(1, 1, -(-longest // SPAN) * SPAN, 0))
    return (cos[0], sin[0]), getattr(attention, "rope_pairs", None)


def decode(attention: FoldedAttention, shape: Shape, x: Tensor, rope: Rope, cached: Cached, attend: Attend) -> Tensor:
    """The heads' outputs side by side for new tokens whose states are cached: (B, d) → (B, H·D).

    Args:
        shape: the layer's, by `shape_of`.
        rope: tables (B, D) of the new tokens.
        attend: a kernel, or `attend`.
    """
    x, new = x[:, None], (rope[0][:, None], rope[1][:, None])
    if isinstance(attention, LatentAttention):
        q_nope, q_rope = attention.split_queries(x, new)
        up_k, up_v = attention.up(x)
        first = by_head(q_nope, up_k)[:, :, 0] if shape.asks_first else None
        second = q_rope[:, :, 0] if shape.second else None
        turned = attention.turned_queries(q_nope, new)[:, :, 0].unflatten(-1, (-1, shape.wide)) if shape.numbers else None
        mixed = attend(shape, Asked(attention.scale, first, second, turned, attention.sinks), cached)
        return by_head(mixed[:, :, None], up_v.mT).flatten(1)
    assert isinstance(attention, ReusedKeyAttention)
    q = rotate(attention.queries(x), pick(new, attention.rope_pairs)).to(x)[:, :, 0]
    first, second = q.chunk(2, -1)
    mixed = attend(shape, Asked(attention.scale, first, second, sinks=attention.sinks), cached)
    return attention.values_of(mixed[:, :, None]).flatten(1)
