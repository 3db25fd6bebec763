"""GQA and MQA: G key/value heads → G' (2305.13245), in the canonical form of `attention.py`.

A fold has three steps: choose which key heads share one (`neighbours`, `similar`), bring them side by side
(`permute_heads`, exact), and merge each group by one of `METHODS`. `m = G / G'` key heads meet in a group.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.lowrank import power_and_inverse, top_eigenvectors
from kvfold.surgery.rope import from_complex, to_complex

Groups = list[list[int]]
BIASES = ("q_bias", "k_bias", "v_bias")


def neighbours(kv_heads: int, target: int) -> Groups:
    """Consecutive heads share a group, as 2305.13245 pools them. Raises ValueError when `target` does not divide."""
    if target < 1 or kv_heads % target:
        raise ValueError(f"{kv_heads} key heads do not divide into {target} groups")
    size = kv_heads // target
    return [list(range(g * size, (g + 1) * size)) for g in range(target)]


def similar(weights: AttentionWeights, target: int, moment: Tensor | None) -> Groups:
    """Groups of equal size whose members align best, from `neighbours` by swapping heads while that helps.

    The similarity of two heads is the normalised inner product of their keys and values after the best gauge:
    `Σ_i |⟨k_a,i , k_b,i⟩| / (‖k_a‖‖k_b‖)` for keys and the nuclear norm of `E[v_a v_bᵀ]` likewise for values.
    """
    groups = neighbours(weights.kv_heads, target)
    _, k, v = weights.augmented()
    moment = _moment(k, moment)
    pairs = to_complex(k)  # (G, D/2, n)
    inner = torch.einsum("afm,mn,bfn->abf", pairs, moment.to(pairs.dtype), pairs.conj()).abs().sum(-1)
    values = torch.einsum("aim,mn,bjn->abij", v, moment, v)
    inner_v = torch.linalg.eigvalsh(values.mT @ values).clamp_min(0).sqrt().sum(-1)  # the nuclear norm, quicker
    likeness = (inner / _outer_root(inner) + inner_v / _outer_root(inner_v)).tolist()

    def within(members: list[int]) -> float:
        return sum(likeness[a][b] for a in members for b in members if a < b)

    improved = True
    while improved:
        improved = False
        for a in range(target):
            for b in range(a + 1, target):
                for i in range(len(groups[a])):
                    for j in range(len(groups[b])):
                        one, two = list(groups[a]), list(groups[b])
                        one[i], two[j] = two[j], one[i]
                        if within(one) + within(two) > within(groups[a]) + within(groups[b]) + 1e-9:
                            groups[a], groups[b] = one, two
                            improved = True
    return [sorted(g) for g in groups]


def permute_heads(weights: AttentionWeights, groups: Groups) -> AttentionWeights:
    """Reorder key heads so that each group is contiguous, and the query heads with them. Exact."""
    heads = [g for members in groups for g in members]
    if heads == sorted(heads):
        return weights
    order = torch.tensor(heads, device=weights.k.device)
    per = weights.heads // weights.kv_heads
    queries = (order[:, None] * per + torch.arange(per, device=order.device)).flatten()

    def pick(name: str, index: Tensor) -> Tensor | None:
        tensor: Tensor | None = getattr(weights, name)
        return None if tensor is None else tensor[index]

    norms = () if weights.k_norm is None or weights.k_norm.ndim == 1 else ("q_norm", "k_norm")
    moved: dict[str, Any] = {
        name: pick(name, queries if name[0] in "qos" else order) for name in ("q", "k", "v", "o", "sinks", *BIASES, *norms)
    }
    return replace(weights, **moved)


def _pooled(weights: AttentionWeights, pool: Callable[[Tensor], Tensor]) -> AttentionWeights:
    """`pool` on keys, values and their biases; queries and output stay the tensors they are."""
    biases = {n: pool(b) for n in ("k_bias", "v_bias") if (b := getattr(weights, n)) is not None}
    return replace(weights, k=pool(weights.k), v=pool(weights.v), **biases)


def mean(weights: AttentionWeights, target: int, moment: Tensor | None, generator: torch.Generator) -> AttentionWeights:
    """The mean of the group's raw heads, queries and output untouched (2305.13245, its best initialisation)."""
    return _pooled(weights, lambda heads: heads.unflatten(0, (target, -1)).mean(1))


def first(weights: AttentionWeights, target: int, moment: Tensor | None, generator: torch.Generator) -> AttentionWeights:
    """The group's first head serves all (2305.13245, "select single")."""
    return _pooled(weights, lambda heads: heads.unflatten(0, (target, -1))[:, 0])


def random(weights: AttentionWeights, target: int, moment: Tensor | None, generator: torch.Generator) -> AttentionWeights:
    """Gaussian heads of the source's root mean square (2305.13245, "random initialisation"): the floor of the table."""

    def draw(heads: Tensor) -> Tensor:
        noise = torch.randn((target, *heads.shape[1:]), generator=generator)
        return noise.to(heads) * heads.float().square().mean().sqrt().to(heads)

    return _pooled(weights, draw)


def align(
    weights: AttentionWeights, target: int, moment: Tensor | None, generator: torch.Generator, rounds: int = 20
) -> AttentionWeights:
    """Rotate the heads of a group onto each other with exact gauges, then take the mean and restore its norm.

    Keys: one phase per head and frequency, maximising `‖Σ_g e^{-jφ_g} k_g‖²` (fixed point from the phases of the leading
    eigenvector). Values: generalised orthogonal Procrustes. Both in the metric of `moment`, or of the weights alone
    without one. Means are scaled back to the mean Frobenius norm of the members.
    """
    q, k, v = weights.augmented()
    metric = None if moment is None else power_and_inverse(moment, 0.5)[0]

    def measured(rows: Tensor) -> Tensor:
        return rows if metric is None else rows @ metric.to(rows.dtype)

    pairs = to_complex(k).unflatten(0, (target, -1)).transpose(1, 2)  # (G', D/2, m, n)
    seen = measured(pairs)
    phase = _unit(top_eigenvectors(seen @ seen.mH, 1))  # (G', D/2, m, 1)
    for _ in range(rounds):
        phase = _unit(seen @ (phase.conj() * seen).sum(-2, keepdim=True).mH)
    merged = (phase.conj() * pairs).mean(-2, keepdim=True)
    merged = merged * _norm_ratio(seen, measured(merged))
    new_k = from_complex(merged[..., 0, :])
    gain = phase.conj()[..., 0].transpose(1, 2).flatten(0, 1)  # (G, D/2): what a query of head g is multiplied by

    values = v.unflatten(0, (target, -1))  # (G', m, D, n)
    seen_v = measured(values)
    turn = torch.eye(v.shape[1], dtype=v.dtype, device=v.device).expand(*values.shape[:2], -1, -1)
    centre = seen_v[:, :1]
    for _ in range(rounds):
        left, _, right = torch.linalg.svd(seen_v @ centre.mT)  # head = turn @ centre
        turn = left @ right
        centre = (turn.mT @ seen_v).mean(1, keepdim=True)
    new_v = (turn.mT @ values).mean(1)
    new_v = new_v * _norm_ratio(seen_v.transpose(1, 2), measured(new_v)[:, :, None])[..., 0]
    per = weights.heads // weights.kv_heads
    new_o = weights.o @ turn.flatten(0, 1).repeat_interleave(per, 0)
    return weights.with_augmented(_turn_queries(q, gain), new_k, new_v, new_o)


def pca(weights: AttentionWeights, target: int, moment: Tensor | None, generator: torch.Generator) -> AttentionWeights:
    """`pca_candidates` without a measurement: the powers that do best most often."""
    return next(pca_candidates(weights, target, moment, powers=((0.5, 0.0),)))[1]


def pca_candidates(
    weights: AttentionWeights,
    target: int,
    moment: Tensor | None,
    powers: Iterable[tuple[float, float]],
    phases_only: bool = False,
) -> Iterator[tuple[str, AttentionWeights]]:
    """The best shared key per frequency and the best shared value subspace, absorbed into W_Q and W_O.

    Keys: per group and frequency, complex rank 1 minimising `Σ_g e_g^a E|k_g - u_g z|²`, `e_g` the mean query energy at
    that frequency: the leading eigenvector of an m × m Hermitian matrix. Values: rank D of the stacked values of the group,
    minimising `Σ_g E‖M_g^{b/2} (v_g - v̂_g)‖²` with `M_g = Σ_h W_O,hᵀ W_O,h`: the leading eigenvectors of an mD × mD
    matrix. Both are exact where the group's heads really share one; `E` is over `moment`, or over white inputs without.

    Theory says a = b = 1; neither is always best, because a head that attends diffusely averages its error away. So
    each `(a, b)` of `powers` is a candidate, yielded with a label, for the caller to measure. With `phases_only` queries are
    turned and never scaled, as where a norm stands behind them.
    """
    q, k, v = weights.augmented()
    moment = _moment(k, moment)
    per, size = weights.heads // weights.kv_heads, weights.kv_heads // target

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(0, (target, size))

    pairs = grouped(to_complex(k)).transpose(1, 2)  # (G', D/2, m, n)
    gram = pairs @ to_complex(k @ moment).unflatten(0, (target, size)).transpose(1, 2).mH  # (G', D/2, m, m)
    energy = ((q @ moment) * q).sum(-1).unflatten(1, (2, -1)).sum(1)  # (H, D/2): E|q_h,i|²
    energy = grouped(energy.unflatten(0, (-1, per)).mean(1)).transpose(1, 2)  # (G', D/2, m)
    energy = energy.clamp_min(float(energy.amax()) * 1e-9 + torch.finfo(energy.dtype).tiny)
    importance = torch.einsum("hda,hdb->hab", weights.o, weights.o).unflatten(0, (-1, per)).sum(1)  # (G, D, D)
    values = grouped(v).flatten(1, 2)  # (G', m·D, n)
    value_gram = values @ moment @ values.mT

    for a, b in powers:
        weight = energy ** (a / 2)  # (G', D/2, m)
        shared = top_eigenvectors(weight[..., None] * gram * weight[..., None, :], 1)[..., 0]  # (G', D/2, m)
        read = shared.conj() * weight  # z = Σ_g read_g k_g, and k_g ≈ (u_g / w_g) z
        power = (read[..., None, :] @ gram @ read[..., None].conj())[..., 0, 0].real  # E|z|²
        before = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
        scale = _ratio(before, power).sqrt()[..., None]  # a gauge: keep keys' size
        key = scale * (read[..., None, :] @ pairs)[..., 0, :]  # (G', D/2, n)
        gain = (shared.conj() / weight / scale).transpose(1, 2).flatten(0, 1)  # (G, D/2)
        gain = _unit(gain) if phases_only else gain

        root, inverse = power_and_inverse(importance, b / 2)
        left = torch.stack([torch.block_diag(*block) for block in grouped(root)])  # (G', m·D, m·D)
        basis = top_eigenvectors(left @ value_gram @ left, weights.head_dim)  # (G', m·D, D)
        value = basis.mT @ left @ values  # (G', D, n)
        level = _ratio(values.square().sum((1, 2)) / size, value.square().sum((1, 2))).sqrt()[:, None, None]
        expand = inverse @ (basis / level).unflatten(1, (size, -1)).flatten(0, 1)  # (G, D, D): v_g ≈ expand_g c
        yield (
            f"key power {a:g}, value power {b:g}",
            weights.with_augmented(
                _turn_queries(q, gain),
                from_complex(key),
                level * value,
                weights.o @ expand.repeat_interleave(per, 0),
            ),
        )


Method = Callable[[AttentionWeights, int, Tensor | None, torch.Generator], AttentionWeights]
METHODS: dict[str, Method] = {  # as GROUPING in names.py
    "mean": mean,
    "first": first,
    "random": random,
    "align": align,
    "pca": pca,
}
PCA_POWERS = tuple((a, b) for a in (0.5, 0.0, 1.0) for b in (0.0, 0.5, 1.0))


def candidates(
    method: str,
    weights: AttentionWeights,
    target: int,
    moment: Tensor | None,
    generator: torch.Generator,
    phases_only: bool = False,
) -> Iterator[tuple[str, AttentionWeights]]:
    """What `method` has to offer for one layer, each with a label: several for `pca`, one for the others."""
    if method == "pca":
        yield from pca_candidates(weights, target, moment, PCA_POWERS, phases_only)
    else:
        yield method, METHODS[method](weights, target, moment, generator)


def _moment(k: Tensor, moment: Tensor | None) -> Tensor:
    """`moment`, or white inputs: E[x xᵀ] = 1, zero mean, and the constant 1 of the bias column."""
    return torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) if moment is None else moment


def _turn_queries(q: Tensor, gain: Tensor) -> Tensor:
    """Multiply frequency i of every query of key head g by `gain` (G, D/2) complex."""
    per = q.shape[0] // gain.shape[0]
    return from_complex(to_complex(q) * gain.repeat_interleave(per, 0)[..., None])


def _unit(z: Tensor) -> Tensor:
    return torch.where(z == 0, torch.ones_like(z), z / z.abs().clamp_min(torch.finfo(z.real.dtype).tiny))


def _norm_ratio(members: Tensor, merged: Tensor) -> Tensor:
    """Mean Frobenius norm of a group's members over that of their merge: (G', rows, m, n), (G', rows, 1, n) → (G', 1, 1, 1)."""
    norm = torch.linalg.vector_norm(members, dim=(1, 3)).mean(1)
    return _ratio(norm, torch.linalg.vector_norm(merged, dim=(1, 3))[:, 0])[:, None, None, None]


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """The quotient of two sizes, and 1 where either is zero, as in a layer that was pruned: nothing is there to be kept."""
    none = (before <= 0) | (after <= 0)
    return torch.where(none, 1.0, before / after.masked_fill(none, 1.0))


def _outer_root(inner: Tensor) -> Tensor:
    """√(a_ii a_jj), what normalises a Gram-like matrix."""
    diagonal = inner.diagonal().clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
    return diagonal[:, None] * diagonal
