"""Queries and keys behind an RMSNorm, as Qwen3 and Gemma 3 have it: linear maps times a scalar per token and head.

`q̂ = γ_q ⊙ W_q x · t(x)` and `k̂ = γ_k ⊙ W_k y · s(y)`, where `t` and `s` are one over the root mean square of a head's numbers.
RoPE turns what stands behind the norm, and commutes with the scalars. So a fold works on the linear parts, at the size that the
scalars give them on average (`Linear`), and what it finds is put behind the exact scalars again (`Linear.restored`):

- a design's queries are maps of the source's, `M_h q_h`, and the same maps read normed queries;
- its keys are multiplied by `s`, token by token, when scores are made; or they keep the size that `s` has on average, which
  is not exact and caches no scalars.

Where the norm stands behind RoPE (Hunyuan), its sizes are the same, but weights that differ between the two numbers of a pair
do not commute with a rotation: `diag(γ_q γ_k)` is `m` times the identity and `δ` times a mirror image `S` for each pair, and
`S R_u = R_-u S`. The query of `m` is turned to its position as ever, that of `δ S` backwards (`LatentWeights.q_gains`).

In a design with a cache of a latent nothing may be left out of keys because it is constant over them: behind `s` it is not.
GQA and MQA stay in the source's class, where a norm stands behind every kept head: `merged`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvfold.surgery import grouping
from kvfold.surgery.attention import AttentionWeights, told
from kvfold.surgery.designs import LatentWeights, RebuiltKeyWeights, ReusedKeyWeights

Folded = TypeVar("Folded", bound=LatentWeights | ReusedKeyWeights | RebuiltKeyWeights)
POOLED = ("mean", "first", "random")
"""Methods that take the heads as they are, and their norms with them."""


class Linear:
    """What is left of a normed layer without its norms: `weights`, with scores over √D.

    Args:
        source: the layer with its norms.
        moment: E[z zᵀ] of the augmented input (d + 1, d + 1); None for white inputs.
        rebuilt: for a design that rebuilds its keys and norms them then: γ_k stands with the queries.
        sized: whether a design with a latent caches the keys' scalars.
    """

    def __init__(self, source: AttentionWeights, moment: Tensor | None, rebuilt: bool = False, sized: bool = True) -> None:
        self.source, self.sized = source.rooted(), sized
        q, k, v = self.source.augmented()
        per, (eps, together) = source.heads // source.kv_heads, told(held(source.norm))
        self.query_gain, self.key_gain = (
            weight.expand(heads, -1) for weight, heads in ((held(self.source.q_norm), len(q)), (held(source.k_norm), len(k)))
        )
        self.query_size, self.key_size = (mean_inverse_size(rows, moment, eps, together) for rows in (q, k))
        queries = self.query_gain * self.query_size[:, None]
        keys = self.key_gain * self.key_size[:, None]
        self.gains: Tensor | None = None
        if held(source.norm)[2] and not rebuilt:
            both = self.query_gain * self.key_gain.repeat_interleave(per, 0)  # (H, D)
            common = both.unflatten(1, (2, -1)).mean(1).repeat(1, 2)
            self.gains = torch.stack([common, both - common])
            queries, keys = common * self.query_size[:, None], self.key_size[:, None].expand_as(keys)
        if rebuilt:
            queries, keys = queries * self.key_gain.repeat_interleave(per, 0), self.key_size[:, None].expand_as(keys)
        bare = replace(self.source, q_norm=None, k_norm=None, norm=None)
        self.weights = bare.with_augmented(q * queries[..., None], k * keys[..., None], v, source.o)
        self.inverse: Tensor | None = None

    def restored(self, folded: Folded) -> Folded:
        """What was folded of `weights`, behind the norms."""
        source = self.source
        if isinstance(folded, RebuiltKeyWeights):
            size = self.key_size[:, None]
            return replace(
                folded,
                q=source.q,
                q_bias=source.q_bias,
                up_k=folded.up_k / size[..., None],
                k_bias=None if folded.k_bias is None else folded.k_bias / size,
                q_norm=self.query_gain,
                k_norm=self.key_gain,
                norm=source.norm,
            )
        if self.inverse is None:
            self.inverse = torch.linalg.pinv(self.weights.augmented()[0])  # (H, n, D)
        names = ("q_nope", "q_rope") if isinstance(folded, LatentWeights) else ("q",)
        queries = torch.cat([getattr(folded, name) for name in names], 1)  # (H, E, d)
        column = queries.new_zeros(queries.shape[:2]) if folded.q_bias is None else folded.q_bias
        maps = torch.cat([queries, column[..., None]], -1) @ self.inverse  # (H, E, D)
        maps = maps if self.gains is not None else maps * self.query_gain[:, None]
        if self.sized:
            maps = maps / self.key_size.repeat_interleave(source.heads // source.kv_heads)[:, None, None]
        parts = maps.split([getattr(folded, name).shape[1] for name in names], 1)
        return replace(
            folded,
            **dict(zip(names, parts, strict=True)),
            q_bias=None,
            q_raw=source.q,
            q_raw_bias=source.q_bias,
            k_raw=source.k if self.sized else None,
            k_raw_bias=source.k_bias if self.sized else None,
            norm=source.norm,
            q_gains=self.gains,
        )


def mean_inverse_size(rows: Tensor, moment: Tensor | None, eps: float, together: bool) -> Tensor:
    """One over the root mean square of every head's numbers: rows (heads, D, n) → (heads,)."""
    energy = ((rows if moment is None else rows @ moment) * rows).sum(-1).mean(-1)
    energy = energy.mean().expand_as(energy) if together else energy
    return (energy.clamp_min(0) + eps).rsqrt()


def merged(
    method: str, weights: AttentionWeights, target: int, moment: Tensor | None, generator: torch.Generator
) -> Iterator[tuple[str, AttentionWeights]]:
    """What a method of `grouping` offers where a norm stands behind every head, or one behind all of them.

    Turning a head by a phase per frequency changes nothing behind a norm whose weight is the same for both numbers of a pair:
    so both get their root mean square, and the weights of the heads take what is over. Queries are turned only, for their size
    is the norm's. The keys' norm is given the size that the shared keys have.
    """
    if target == weights.kv_heads:
        yield "unchanged", weights
        return
    if method in POOLED:
        key_norm = held(weights.k_norm)
        shared = key_norm if key_norm.ndim == 1 else key_norm.unflatten(0, (target, -1)).mean(1)
        for label, pooled in grouping.candidates(method, weights, target, moment, generator):
            yield label, replace(pooled, k_norm=shared)
        return
    query_norm, key_norm = paired(held(weights.q_norm)), paired(held(weights.k_norm))
    before = held(weights.norm) * torch.tensor([1.0, 1.0, 0.0]).to(held(weights.norm))  # even weights commute with RoPE
    even = replace(weights, q_norm=query_norm, k_norm=key_norm, norm=before)
    if not held(weights.norm)[2]:
        even = replace(
            even,
            **scaled(weights, "q", ratio(held(weights.q_norm), query_norm)),
            **scaled(weights, "k", ratio(held(weights.k_norm), key_norm)),
        )
    linear = Linear(replace(even, scale=None), moment)
    for label, folded in grouping.candidates(method, linear.weights, target, moment, generator, phases_only=True):
        size = (query_norm * linear.query_size[:, None])[..., None]
        shared = key_norm if key_norm.ndim == 1 else key_norm.unflatten(0, (target, -1)).square().mean(1).sqrt()
        bare = replace(folded, k=folded.k / shared[..., None], k_bias=divided(folded.k_bias, shared))
        level = mean_inverse_size(bare.augmented()[1], moment, *told(held(weights.norm)))
        yield (
            label,
            replace(
                bare,
                q=folded.q / size,
                q_bias=divided(folded.q_bias, size[..., 0]),
                q_norm=query_norm,
                k_norm=shared * (1 / level).mean(),
                norm=weights.norm,
                scale=weights.scale,
            ),
        )


def paired(weight: Tensor) -> Tensor:
    """A norm's weight (..., D) with both numbers of a pair at their root mean square."""
    mean = weight.unflatten(-1, (2, -1)).square().mean(-2).sqrt().clamp_min(torch.finfo(weight.dtype).tiny)
    return torch.cat([mean, mean], -1)


def ratio(before: Tensor, after: Tensor) -> Tensor:
    return torch.where(after > torch.finfo(after.dtype).tiny, before / after, torch.zeros_like(after))


def scaled(weights: AttentionWeights, role: str, by: Tensor) -> dict[str, Any]:
    """Queries or keys and their biases times `by` (D,) or (heads, D)."""
    matrix, bias = getattr(weights, role), getattr(weights, f"{role}_bias")
    return {role: matrix * by[..., None], f"{role}_bias": None if bias is None else bias * by}


def divided(bias: Tensor | None, by: Tensor) -> Tensor | None:
    return None if bias is None else bias / by


def held(tensor: Tensor | None) -> Tensor:
    """What a layer with norms has."""
    assert tensor is not None
    return tensor
