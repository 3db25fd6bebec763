"""MLA (2405.04434): any RoPE attention → one latent of `r` numbers and one shared rotary key of `R`, per token.

Keys split into a rotary part, shared by all heads, and a rest that becomes position-free and is read from the latent together
with the values: `k_h = [W_UK,h c ; k_rope]`, `v_h = W_UV,h c`.

1. `rotary_slots`: per frequency, the best shared key (complex PCA across key heads), as in `grouping.pca`.
2. `coherence`: the rest of a key loses its rotation. A frequency whose phase stays put over the distances that a head attends
   to survives that; one whose phase spins does not. Its expected phase, a complex number per head and frequency, multiplies the
   query.
3. `joint_latent`: one low-rank map for the rests and the values of all heads.

Which weight of the queries, which weight of the values and which balance between keys and values is best is measured: `search`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.surgery.attention import AttentionWeights, LatentWeights
from kvfold.surgery.lowrank import power_and_inverse, top_eigenvectors
from kvfold.surgery.rope import Rope, from_complex, rotate, to_complex


@dataclass(frozen=True)
class Choice:
    """What one candidate is made with.

    Attributes:
        slots: power of the query energies in the rotary slots' PCA.
        values: power of `W_Oᵀ W_O` in the values' metric.
        balance: weight of the position-free keys against the values, 1 where both whole ones weigh the same; 0 leaves them
            out, which is MQA or MFA.
    """

    slots: float
    values: float
    balance: float

    def __str__(self) -> str:
        return f"slot power {self.slots:g}, value power {self.values:g}, balance {self.balance:g}"


START = Choice(slots=0.0, values=0.0, balance=0.3)
TRIED: dict[str, tuple[float, ...]] = {
    "balance": (0.0, 0.1, 1.0, 3.0, 10.0),
    "slots": (0.5, 1.0),
    "values": (1.0,),
}
"""What `search` tries, one after the other, besides `START`."""


@torch.no_grad()
def attention_lags(weights: AttentionWeights, x: Tensor, rope: Rope) -> Tensor:
    """How far each head looks back: the mean attention on distance Δ over the queries of `x` (B, T, d) → (H, T)."""
    tokens = x.shape[1]
    q, k, _ = weights.augmented()
    q, k = q.to(x), k.to(x).repeat_interleave(weights.heads // weights.kv_heads, 0)
    places = torch.arange(tokens, device=x.device)
    distance = places[:, None] - places
    lags = x.new_zeros(weights.heads, tokens)
    for row in torch.cat([x, torch.ones_like(x[..., :1])], dim=-1):
        scores = rotate(row @ q.mT, rope) @ rotate(row @ k.mT, rope).mT * weights.head_dim**-0.5  # (H, T, T)
        attention = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        lags.index_add_(1, distance.clamp_min(0).flatten(), attention.flatten(1))
    return lags / (len(x) * tokens)


def coherence(lags: Tensor, rope: Rope) -> Tensor:
    """`E[e^{j f_i Δ}]` over a head's attention: lags (H, T) and the rotary tables → (H, D/2) complex.

    The distances are those of a query at position Δ and a key at position 0, so the tables themselves hold `f_i Δ`.
    """
    cos, sin = (table.chunk(2, dim=-1)[0].to(lags) for table in rope)
    turn = torch.complex(cos, sin)  # (T, D/2)
    return lags.to(turn.dtype) @ turn


def search(
    weights: AttentionWeights,
    rank: int,
    rope_dim: int,
    moment: Tensor,
    phase: Tensor,
    measure: Callable[[LatentWeights], float],
) -> tuple[float, Choice, LatentWeights]:
    """The best of `fold` by `measure`, one setting after the other: least error, choice, weights."""

    def tried(choice: Choice) -> tuple[float, Choice, LatentWeights]:
        folded = fold(weights, rank, rope_dim, moment, phase, choice)
        return measure(folded), choice, folded

    best = tried(START)
    for name, values in TRIED.items():
        for value in values:
            best = min(best, tried(replace(best[1], **{name: value})), key=lambda entry: entry[0])
    return best


def fold(
    weights: AttentionWeights, rank: int, rope_dim: int, moment: Tensor, phase: Tensor, choice: Choice = START
) -> LatentWeights:
    """One layer as latent attention.

    Args:
        weights: the source, without biases on q, k and v, float64.
        rank: width `r` of the latent.
        rope_dim: width `R` of the rotary key; it holds the first R/2 frequencies of the source, one component each.
        moment: E[z zᵀ] of the augmented input (d + 1, d + 1).
        phase: what `coherence` measured, (H, D/2) complex.

    Raises:
        ValueError: biases, an odd or too large `rope_dim`, or a `rank` above the full rank of keys and values.
    """
    if any(b is not None for b in (weights.q_bias, weights.k_bias, weights.v_bias)):
        raise ValueError("biases on q, k or v have no place in this latent attention")
    if rope_dim % 2 or not 2 <= rope_dim <= weights.head_dim:
        raise ValueError(f"rope_dim {rope_dim} must be even and between 2 and {weights.head_dim}")
    if not 1 <= rank <= full_rank(weights.k.shape[-1], weights.kv_heads, weights.head_dim):
        raise ValueError(f"rank {rank} must lie between 1 and the full rank of keys and values")
    moment, phase = moment[:-1, :-1], phase.to(torch.complex128)
    key, gain, rest = rotary_slots(weights, rope_dim // 2, moment, choice.slots)
    down, up_k, up_v = joint_latent(weights, rest, rank, moment, phase, choice)
    return _assemble(weights, key, gain, down, up_k, up_v, phase)


def full_rank(hidden: int, kv_heads: int, head_dim: int) -> int:
    """The rank above which a latent has nothing more to hold."""
    return min(hidden, 2 * kv_heads * head_dim)


def rotary_slots(weights: AttentionWeights, slots: int, moment: Tensor, power: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best shared key of the first `slots` frequencies, and what it leaves of every key.

    Minimises `Σ_g e_g^power E|k_g - u_g z|²` per frequency, `e_g` the mean query energy of key head g there.

    Returns:
        The shared keys (slots, d) complex, the factor of each key head's queries (G, slots) complex, and the rest of all
        keys (G, D/2, d) complex.
    """
    per = weights.heads // weights.kv_heads
    pairs = to_complex(weights.k)  # (G, D/2, d)
    gram = torch.einsum("afm,bfm->fab", to_complex(weights.k @ moment), pairs.conj())[:slots]  # (slots, G, G)
    energy = ((weights.q @ moment) * weights.q).sum(-1).unflatten(1, (2, -1)).sum(1)  # (H, D/2)
    energy = energy.unflatten(0, (-1, per)).mean(1).T[:slots]  # (slots, G)
    weight = energy.clamp_min(float(energy.amax()) * 1e-9 + torch.finfo(energy.dtype).tiny) ** (power / 2)
    shared = top_eigenvectors(weight[..., None] * gram * weight[..., None, :], 1)[..., 0]
    read = shared.conj() * weight  # z = Σ_g read_g k_g, and k_g ≈ (u_g / w_g) z
    size = (read[..., None, :] @ gram @ read[..., None].conj())[..., 0, 0].real
    before = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    scale = (before / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()[:, None]  # a gauge: keep keys' size
    key = scale * torch.einsum("fg,gfm->fm", read, pairs[:, :slots])
    back = (shared / weight / scale).T  # (G, slots): k_g ≈ back_g key
    rest = pairs.clone()
    rest[:, :slots] -= back[..., None] * key
    return key, back.conj(), rest


def joint_latent(
    weights: AttentionWeights, rest: Tensor, rank: int, moment: Tensor, phase: Tensor, choice: Choice
) -> tuple[Tensor, Tensor, Tensor]:
    """One latent for the rests of all keys and all values: the leading eigenvectors of their weighted second moment.

    Keys are weighted by the second moment of the queries that read them, turned by their coherence, so that the error is
    that of the scores; values by `(W_Oᵀ W_O)^power`, so that the error is that of the output.

    Returns:
        down (r, d), up_k (G, D, r), up_v (G, D, r).
    """
    per, width = weights.heads // weights.kv_heads, weights.head_dim
    queries = from_complex(phase[..., None] * to_complex(weights.q))  # (H, D, d)
    reading = (queries @ moment @ queries.mT).unflatten(0, (-1, per)).sum(1) / width  # (G, D, D)
    importance = (weights.o.mT @ weights.o).unflatten(0, (-1, per)).sum(1)
    root_k, inverse_k = power_and_inverse(reading, 0.5)
    root_v, inverse_v = power_and_inverse(importance, choice.values / 2)
    keys, values, whole = root_k @ from_complex(rest), root_v @ weights.v, root_k @ weights.k
    # Against the energy of the whole keys, so that a rest of nothing is given nothing.
    energies = [((x @ moment) * x).sum().clamp_min(torch.finfo(x.dtype).tiny) for x in (whole, values)]
    balance = (choice.balance * energies[1] / energies[0]).sqrt()
    stacked = torch.cat([balance * keys, values]).flatten(0, 1)  # (2·G·D, d)
    basis = top_eigenvectors(stacked @ moment @ stacked.mT, rank)  # (2·G·D, r)
    down = basis.mT @ stacked
    up_k, up_v = basis.unflatten(0, (2, -1, width))  # (G, D, r) each
    energy = ((down @ moment) * down).sum() / rank
    level = energy.clamp_min(torch.finfo(energy.dtype).tiny).rsqrt()  # a gauge: E|c|² = r, which the layouts count on
    up_k = inverse_k @ up_k / (balance if choice.balance else 1.0)
    return down * level, up_k / level, inverse_v @ up_v / level


def _assemble(
    weights: AttentionWeights, key: Tensor, gain: Tensor, down: Tensor, up_k: Tensor, up_v: Tensor, phase: Tensor
) -> LatentWeights:
    per, width, slots = weights.heads // weights.kv_heads, weights.head_dim, len(key)
    queries = to_complex(weights.q)
    rotary = queries[:, :slots] * gain.repeat_interleave(per, 0)[..., None]
    free = from_complex(queries * phase[..., None])
    scale = math.sqrt((width + 2 * slots) / width)  # scores are divided by the new width's root
    return LatentWeights(
        q_nope=free * scale,
        q_rope=from_complex(rotary) * scale,
        down=down,
        k_rope=from_complex(key),
        up_k=up_k.repeat_interleave(per, 0),
        up_v=up_v.repeat_interleave(per, 0),
        o=weights.o,
        o_bias=weights.o_bias,
    )
