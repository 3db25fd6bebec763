"""The published ways to latent attention, each as its paper and its authors' code have it, for comparison with `latent.py`.

MHA2MLA (2502.14837), TransMLA (2502.07864) and the covariance SVD of CARE (2603.17946). The first two decide which numbers
of the keys go on turning, `Rotary`, and find one latent for the other numbers and the values; `absorbed` makes a layer of
both. The third rebuilds all keys.

Inputs are augmented, `z = [x; 1]` of `n = d + 1` numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.designs import LatentWeights, RebuiltKeyWeights
from kvfold.surgery.lowrank import gauge, leading_directions

DAMPING = 0.01
"""Of CARE's covariance, relative to its mean diagonal: `percdamp` of the authors' code. Their square root takes ten times as
much, which is worse on the models of our tables."""


@dataclass(frozen=True)
class Rotary:
    """A basis of all keys whose first R numbers turn: `basis` (G·D, G·D) orthogonal, rows as new numbers, the first R of them
    half-split; `pairs` (R/2,) the source's frequencies by which they turn."""

    basis: Tensor
    pairs: Tensor

    @property
    def width(self) -> int:
        return 2 * len(self.pairs)


Latent = tuple[Tensor, Tensor, Tensor]
"""down (r, n or d), up_k (G·D, r) in the basis of a `Rotary`, up_v (G·D, r). With d columns it does without the biases."""
Baseline = Callable[[AttentionWeights, int, int, Tensor, Tensor], Iterator[tuple[str, LatentWeights | RebuiltKeyWeights]]]
"""(weights in float64, rank, rope_dim, E[z zᵀ], inputs (B, T, d)) → layers with a label, of which the best by measurement
counts. `rope_dim` must be a `rotary_width`."""


def svd_split(
    weights: AttentionWeights, rank: int, rope_dim: int, moment: Tensor, x: Tensor
) -> Iterator[tuple[str, LatentWeights]]:
    """MHA2MLA with SVD_split (2502.14837, section 3.2): half of the latent for the position-free keys, half for the values.

    The paper compares its two SVDs with the rotary pairs of S_2-norm (table 3); here these are measured on the weights, so that
    the method needs no data.
    """
    rotary = selected(weights, weight_norms(weights), rope_dim)
    yield "split SVD", absorbed(weights, rotary, truncated(weights, rotary, rank, joint=False), moment)


def svd_joint(
    weights: AttentionWeights, rank: int, rope_dim: int, moment: Tensor, x: Tensor
) -> Iterator[tuple[str, LatentWeights]]:
    """MHA2MLA with SVD_joint (2502.14837, section 3.2): one SVD of position-free keys and values; pairs as in `svd_split`."""
    rotary = selected(weights, weight_norms(weights), rope_dim)
    yield "joint SVD", absorbed(weights, rotary, truncated(weights, rotary, rank), moment)


def partial_rope(rule: str) -> Baseline:
    """MHA2MLA's four choices of the pairs that go on turning (2502.14837, section 3.1), with SVD_joint.

    `high`, `low` and `uniform` take the same pairs in every head; `2norm`, the paper's default, takes those of largest
    E‖q‖·E‖k‖ in each key head.
    """

    def method(
        weights: AttentionWeights, rank: int, rope_dim: int, moment: Tensor, x: Tensor
    ) -> Iterator[tuple[str, LatentWeights]]:
        half, kept = weights.head_dim // 2, rope_dim // (2 * weights.kv_heads)
        places = torch.arange(half, device=weights.k.device)
        if rule == "2norm":
            scores = measured_norms(weights, x)
        elif rule == "uniform":  # S_uniform = {⌊k·D/2r⌋}
            chosen = torch.tensor([k * half // kept for k in range(kept)], device=places.device)
            scores = torch.isin(places, chosen).to(weights.k).expand(weights.kv_heads, -1)
        else:
            scores = (places if rule == "low" else -places).to(weights.k).expand(weights.kv_heads, -1)
        rotary = selected(weights, scores, rope_dim)
        yield f"{rule} pairs", absorbed(weights, rotary, truncated(weights, rotary, rank), moment)

    return method


def rorope(
    weights: AttentionWeights, rank: int, rope_dim: int, moment: Tensor, x: Tensor
) -> Iterator[tuple[str, LatentWeights]]:
    """TransMLA (2502.07864): RoRoPE, FreqFold and Balanced KV (sections 4.2, 4.3, appendices B to D).

    The number of frequencies that are folded into one is the paper's parameter, which its code picks by perplexity: every power
    of two that fits is offered, and each layer takes its best. The latent is the PCA of outputs, not centred; keys are
    divided by the mean norm of their channels over the values' beforehand (equation 20) and multiplied by it afterwards.
    """
    for fold in foldings(weights.head_dim, rope_dim):
        rotary = turned(weights, rope_dim, moment, fold)
        _, k, v = (part.flatten(0, 1) for part in weights.augmented())
        free = rotary.basis @ k
        free[: rotary.width] = 0
        norms = [((rows @ moment) * rows).sum(-1).clamp_min(0).sqrt() for rows in (free[rotary.width :], v)]
        ratio = norms[0].mean() / norms[1].mean() if len(norms[0]) else norms[1].new_ones(())
        ratio = ratio if ratio > 0 else torch.ones_like(ratio)
        down, up_k, up_v = shared_directions(free / ratio, v, moment, rank)
        yield f"{fold} folded", absorbed(weights, rotary, (down, up_k * ratio, up_v), moment)


def whitened(
    weights: AttentionWeights, rank: int, rope_dim: int, moment: Tensor, x: Tensor
) -> Iterator[tuple[str, RebuiltKeyWeights]]:
    """CARE's covariance-aware SVD (2603.17946): C^½ Wᵀ truncated, C = E[x xᵀ], keys rebuilt and rotated at every step.

    Keys and values are of the same rank, each by itself, as in the authors' comparison of decompositions; their ranks per
    layer are left out. Biases stay as they are.
    """
    heads = (weights.kv_heads, weights.head_dim)
    c = moment[:-1, :-1]
    metric = c + DAMPING * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    down, up_k, up_v = separate_directions(
        weights.k.flatten(0, 1), weights.v.flatten(0, 1), metric, *halves(weights, rank, None)
    )
    level = gauge(down, c)
    yield (
        "whitened SVD",
        RebuiltKeyWeights(
            q=weights.q,
            down=down * level,
            up_k=up_k.unflatten(0, heads) / level,
            up_v=up_v.unflatten(0, heads) / level,
            o=weights.o,
            q_bias=weights.q_bias,
            k_bias=weights.k_bias,
            o_bias=output_bias(weights),
            **weights.softmax,
        ),
    )


METHODS: dict[str, Baseline] = {  # as PUBLISHED in names.py
    "svd-split": svd_split,
    "svd-joint": svd_joint,
    **{f"partial-rope-{rule}": partial_rope(rule) for rule in ("high", "low", "uniform", "2norm")},
    "rorope": rorope,
    "whitened": whitened,
}


def weight_norms(weights: AttentionWeights) -> Tensor:
    """S_2-norm's score with the norms that white inputs give, (G, D/2): see `measured_norms`."""
    norms = [w.square().sum(-1).unflatten(-1, (2, -1)).sum(-2).sqrt() for w in weights.augmented()[:2]]
    return norms[0].unflatten(0, (weights.kv_heads, -1)).sum(1) * norms[1]


def measured_norms(weights: AttentionWeights, x: Tensor) -> Tensor:
    """S_2-norm's score, (G, D/2): the mean 2-norm of a pair of the queries times that of the key head, summed over the queries'
    heads that read it, on inputs `x` (B, T, d)."""
    z = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1).to(weights.k)

    def norms(w: Tensor) -> Tensor:
        """(·, D, n) → (·, D/2)"""
        return torch.stack([(z @ head.mT).unflatten(-1, (2, -1)).norm(dim=-2).mean(0) for head in w])

    q, k, _ = weights.augmented()
    return norms(q).unflatten(0, (weights.kv_heads, -1)).sum(1) * norms(k)


def selected(weights: AttentionWeights, scores: Tensor, rope_dim: int) -> Rotary:
    """The pairs of highest score (G, D/2) in each key head: a permutation of the keys' numbers."""
    heads, width = weights.kv_heads, weights.head_dim
    half, kept = width // 2, rope_dim // (2 * heads)
    pairs = scores.topk(kept, dim=1).indices.sort(1).values  # (G, kept)
    first = (pairs + torch.arange(heads, device=pairs.device)[:, None] * width).flatten()
    turning = torch.cat([first, first + half])
    free = torch.ones(heads * width, dtype=torch.bool, device=pairs.device)
    free[turning] = False
    order = torch.cat([turning, free.nonzero()[:, 0]])
    return Rotary(torch.eye(heads * width, dtype=weights.k.dtype, device=weights.k.device)[order], pairs.flatten())


def foldings(head_dim: int, rope_dim: int) -> list[int]:
    """Numbers of neighbouring frequencies that can be folded into one where `rope_dim` numbers turn."""
    collapse = max(1, head_dim // rope_dim)
    doubled = [collapse * 2**i for i in range(head_dim.bit_length())]
    return [fold for fold in doubled if fold <= head_dim // 2 and head_dim // 2 % fold == 0]


def turned(weights: AttentionWeights, rope_dim: int, moment: Tensor, fold: int) -> Rotary:
    """RoRoPE: one real rotation per `fold` frequencies across key heads, the same for both halves of a pair, by PCA of keys.

    Without folding it commutes with RoPE. Of a fold's G·fold components the leading ones turn, one after the other by its
    frequencies, or by every (D/R)-th of them where R < D numbers turn.
    """
    heads, width = weights.kv_heads, weights.head_dim
    groups, collapse = width // 2 // fold, max(1, width // rope_dim)
    kept = fold * rope_dim // width
    k = weights.augmented()[1].unflatten(1, (2, groups, fold))  # (G, 2, groups, fold, n)
    rows = k.permute(2, 1, 0, 3, 4).flatten(2, 3)  # (groups, 2, G·fold, n)
    gram = (rows @ moment @ rows.mT).sum(1)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(-1).mT  # (groups, G·fold, G·fold), a component a row
    # where in the keys' G·D numbers the columns of `vectors` stand: a group's frequencies of every head, for each half
    source = torch.arange(heads * width, device=k.device).view(heads, 2, groups, fold).permute(2, 1, 0, 3).flatten(2)
    basis = k.new_zeros(groups, 2, heads * fold, heads * width)
    for group in range(groups):
        for part in range(2):
            basis[group, part, :, source[group, part]] = vectors[group]
    turning = basis[:, :, :kept].transpose(0, 1).flatten(0, 2)  # (R, G·D), half-split
    free = basis[:, :, kept:].flatten(0, 2)
    component = torch.arange(kept, device=k.device) * collapse % fold
    pairs = (torch.arange(groups, device=k.device)[:, None] * fold + component).flatten()
    return Rotary(torch.cat([turning, free]), pairs)


def truncated(weights: AttentionWeights, rotary: Rotary, rank: int, joint: bool = True) -> Latent:
    """MHA2MLA's SVDs of the weights, rotary numbers left out."""
    free, v = rotary.basis @ weights.k.flatten(0, 1), weights.v.flatten(0, 1)
    free[: rotary.width] = 0
    white = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    if joint:
        return shared_directions(free, v, white, rank)
    return separate_directions(free, v, white, *halves(weights, rank, rotary))


def halves(weights: AttentionWeights, rank: int, rotary: Rotary | None) -> tuple[int, int]:
    """A latent's numbers for keys and for values: as many, as far as each has use for them."""
    every = weights.kv_heads * weights.head_dim
    for_keys = min(rank // 2, every - (rotary.width if rotary else 0))
    for_values = min(rank - for_keys, every)
    return rank - for_values, for_values


def shared_directions(k: Tensor, v: Tensor, metric: Tensor, rank: int) -> Latent:
    """The best map of keys and values (G·D, m) together through `rank` numbers."""
    stacked = torch.cat([k, v])
    basis = leading_directions(stacked, metric, rank)
    return basis.mT @ stacked, basis[: len(k)], basis[len(k) :]


def separate_directions(k: Tensor, v: Tensor, metric: Tensor, rank_k: int, rank_v: int) -> Latent:
    """The same for keys and values by themselves, one behind the other."""
    bases = leading_directions(k, metric, rank_k)[:, :rank_k], leading_directions(v, metric, rank_v)
    down = torch.cat([bases[0].mT @ k, bases[1].mT @ v])
    zeros = k.new_zeros(len(k), rank_v), v.new_zeros(len(v), rank_k)
    return down, torch.cat([bases[0], zeros[0]], 1), torch.cat([zeros[1], bases[1]], 1)


def output_bias(weights: AttentionWeights) -> Tensor | None:
    """The output's bias with the values' own in it."""
    return weights.o_bias if weights.v_bias is None else weights.o_bias_with(weights.v_bias)


def absorbed(weights: AttentionWeights, rotary: Rotary, latent: Latent, moment: Tensor) -> LatentWeights:
    """One layer of a rotary basis and a latent: each query head reads the rotary numbers by its own key head's columns, and
    the position-free rest as the latent gives it back.

    Biases that are not in the latent stay whole: a position-free key's is constant over the keys, which softmax ignores, and a
    value's goes to the output.
    """
    per, width, size = weights.heads // weights.kv_heads, weights.head_dim, rotary.width
    heads = (weights.kv_heads, width)
    q, k, _ = weights.augmented()
    read = rotary.basis[:size].unflatten(1, heads).transpose(0, 1)  # (G, R, D)
    queries = torch.cat([q, read.repeat_interleave(per, 0) @ q], 1) * ((width + size) / width) ** 0.5  # (H, D + R, n)
    down, up_k, up_v = latent
    whole = down.shape[1] < q.shape[2]
    if whole:
        down = torch.cat([down, torch.zeros_like(down[:, :1])], 1)
    level = gauge(down, moment)
    cached = torch.cat([down * level, rotary.basis[:size] @ k.flatten(0, 1)])  # (r + R, n)
    up_k = (rotary.basis.mT @ up_k).unflatten(0, heads) / level
    return LatentWeights(
        q_nope=queries[:, :width, :-1],
        q_rope=queries[:, width:, :-1],
        down=cached[: len(down), :-1],
        k_rope=cached[len(down) :, :-1],
        up_k=up_k.repeat_interleave(per, 0),
        up_v=up_v.unflatten(0, heads).repeat_interleave(per, 0) / level,
        o=weights.o,
        pairs=rotary.pairs,
        q_bias=None if weights.q_bias is None else queries[..., -1],
        kv_bias=cached[:, -1] if cached[:, -1].any() else None,
        o_bias=output_bias(weights) if whole else weights.o_bias,
        **weights.softmax,
    )
