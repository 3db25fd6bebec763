"""MLA (2405.04434): any RoPE attention → one latent of `r` numbers and one shared rotary key of `R`, per token.

Keys split into a rotary part, shared by all heads, and a rest that becomes position-free and is read from the latent together
with the values: `k_h = [W_UK,h c ; k_rope]`, `v_h = W_UV,h c`.

1. `rotary_slots`: per frequency, the best shared keys (complex PCA across key heads), as in `grouping.pca`.
2. `coherence`: the rest of a key loses its rotation. A frequency whose phase stays put over the distances that a head attends
   to survives that; one whose phase spins does not. Its expected phase, a complex number per head and frequency, multiplies the
   query.
3. `turned_keys`: what the keys' rests are most, a constant and a few numbers times directions over all frequencies, may turn
   whole: each number is cached once and costs every query head a product as wide as its key. Our own layout has them.
4. `joint_latent`: one low-rank map for the rests and the values of all heads.

Which weight of the queries, which weight of the values, which balance between keys and values and which slots are best is
measured: `search`. Inputs are augmented, `z = [x; 1]` of `n = d + 1` numbers, so that biases are one column of the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.designs import LatentWeights, RebuiltKeyWeights, ReusedKeyWeights
from kvfold.surgery.kvfold_attention import Rope, with_sinks
from kvfold.surgery.layer import Layer
from kvfold.surgery.lowrank import (
    gauge,
    leading_directions,
    leading_subspace,
    left_singular,
    power_and_inverse,
    symmetric,
    top_eigenvectors,
)
from kvfold.surgery.names import full_rank
from kvfold.surgery.rope import from_complex, to_complex


@dataclass(frozen=True)
class Choice:
    """What one candidate is made with.

    Attributes:
        slots: power of the query energies in the rotary slots' PCA.
        values: power of `W_Oᵀ W_O` in the values' metric.
        balance: weight of the position-free keys against the values, 1 where both whole ones weigh the same; 0 leaves them
            out, which is MQA or MFA.
        picked: which components of which frequencies get a slot: `first` counts frequencies from the fastest, one component
            each, before any gets a second; `energy` takes the largest; `turning` those that lose most without rotation.
        centred: the latent holds deviations from the mean. What is left out of keys is the constant of `turned_keys`, or, where
            there are none, constant over the keys, which softmax ignores; what is left out of values is a constant of the
            output, which wants an output bias.
        whole_values: values keep their mean nevertheless, for where there is no output bias.
        still: share of MFA-KR's key that does not turn.
    """

    slots: float
    values: float
    balance: float
    picked: str = "first"
    centred: bool = False
    whole_values: bool = False
    still: float = 0.0

    def __str__(self) -> str:
        extra = (
            f", {self.picked} slots"
            + (", centred" if self.centred else "")
            + (f", {self.still:.0%} still" if self.still else "")
        )
        return f"slot power {self.slots:g}, value power {self.values:g}, balance {self.balance:g}{extra}"


START = Choice(slots=0.0, values=0.0, balance=0.3)
Tries = dict[str, tuple[Any, ...]]
STOCK: Tries = {
    "balance": (0.0, 0.1, 1.0, 3.0, 10.0),
    "slots": (0.5, 1.0),
    "values": (1.0,),
}
"""What `search` tries, one after the other, where the rotary key must be the first frequencies and nothing has a bias."""
FREE_START = Choice(slots=0.0, values=0.0, balance=3.0, picked="turning", centred=True)
FREE: Tries = {"picked": ("first", "energy"), "centred": (False,), **STOCK, "balance": (0.0, 0.3, 1.0, 10.0, 30.0)}
"""The same where it may be any."""
BIASED_START = replace(START, balance=3.0, centred=True, whole_values=True)
BIASED: Tries = {**STOCK, "balance": FREE["balance"]}
"""As `STOCK`, where biases are read off the input."""


Folded = TypeVar("Folded")
Queried = TypeVar("Queried", bound=LatentWeights | ReusedKeyWeights | RebuiltKeyWeights)


@torch.no_grad()
def attention_seen(weights: AttentionWeights, x: Tensor, rope: Rope, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where the attention of a batch goes: inputs `x` (B, T, d) → lags (H, T), received (B, T).

    `visible` (T, T) says which keys each query may see, None for all before it and its own.

    `lags` are the summed weights on every distance Δ. Key 0 is left out: trained models rest attention on it that nothing needs
    (attention sinks, 2309.17453), and that mass says nothing of how far a head looks. `received` is the attention that all
    queries of all heads give each token.
    """
    tokens, weights = x.shape[1], weights.to(x.dtype)
    places = torch.arange(tokens, device=x.device)
    distance = places[:, None] - places
    unseen = distance < 0 if visible is None else ~visible.to(x.device)
    hidden = torch.zeros_like(unseen, dtype=x.dtype).masked_fill_(unseen, -torch.inf)
    lags, received = x.new_zeros(weights.heads, tokens), x.new_zeros(x.shape[:2])
    z, tables = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1), tuple(table.repeat(len(x), 1) for table in rope)
    states = weights.states(z.flatten(0, 1), (tables[0], tables[1]))  # of all rows, (H or G, B·T, D)
    for row, (q, k) in enumerate(zip(*(each.split(tokens, 1) for each in states), strict=True)):
        scores = (q * weights.score_scale).unflatten(0, (weights.kv_heads, -1)) @ k[:, None].mT  # (G, H/G, T, T)
        scores = scores if weights.cap is None else weights.cap * (scores / weights.cap).tanh()
        attention = with_sinks(scores.add_(hidden), weights.sinks).softmax(-1)[..., :tokens].flatten(0, 1)
        received[row] = attention.sum((0, 1))
        attention[:, :, 0] = 0
        lags += along_diagonals(attention)
    return lags, received


def along_diagonals(attention: Tensor) -> Tensor:
    """The sums of lower triangular matrices (H, T, T) along their diagonals, the main one first: (H, T)."""
    tokens, flat = attention.shape[-1], attention.flatten(1)
    # In rows of T + 1 the main diagonal is the first column and the one below it the last; the zeros above share the others.
    columns = flat[:, :-1].unflatten(1, (tokens - 1, tokens + 1)).sum(1)
    return torch.cat([columns[:, :1] + flat[:, -1:], columns[:, 2:].flip(1)], 1)


def coherence(lags: Tensor, rope: Rope) -> Tensor:
    """`E[e^{j f_i Δ}]` over a head's attention: lags (H, T), of any sum, and the rotary tables → (H, D/2) complex.

    The distances are those of a query at position Δ and a key at position 0, so the tables themselves hold `f_i Δ`.
    """
    cos, sin = (table.chunk(2, dim=-1)[0].to(lags) for table in rope)
    turn = torch.complex(cos, sin)  # (T, D/2)
    turn = turn * turn.abs()  # a rope type that scales its tables scales the query's and the key's
    share = lags / lags.sum(1, keepdim=True).clamp_min(torch.finfo(lags.dtype).tiny)
    return share.to(turn.dtype) @ turn


Spread = Callable[[Sequence[Choice], Callable[[int, Choice], float]], list[float]]
"""Errors of choices, in order: `work(number, choice)` of each."""


def one_by_one(choices: Sequence[Choice], work: Callable[[int, Choice], float]) -> list[float]:
    return [work(number, choice) for number, choice in enumerate(choices)]


def search(
    fold: Callable[[Choice], Folded],
    measure: Callable[[Folded], float],
    start: Choice = START,
    tries: Tries = STOCK,
    spread: Spread = one_by_one,
) -> list[tuple[float, Choice, Folded | None]]:
    """What is best of `fold` by `measure`, one setting after the other: error, choice, weights; the second best behind it.

    All values of one setting are tried at once, by `spread`. Where that leaves some to others, there are no weights here.
    """
    made: dict[Choice, tuple[float, Folded]] = {}

    def tried(number: int, choice: Choice) -> float:
        folded = fold(choice)
        error = measure(folded)
        made[choice] = error, folded
        for worse in sorted(made, key=lambda each: made[each][0])[2:]:
            del made[worse]
        return error

    def two_best(known: list[tuple[float, Choice]], choices: list[Choice]) -> list[tuple[float, Choice]]:
        errors = spread(choices, tried)
        return sorted([*known, *zip(errors, choices, strict=True)], key=lambda entry: entry[0])[:2]

    best: list[tuple[float, Choice]] = []
    for name, values in tries.items():
        known = best[0][1] if best else start
        others = [replace(known, **{name: value}) for value in values if value != getattr(known, name)]
        best = two_best(best, others if best else [start, *others])
    best = best or two_best([], [start])
    return [(error, choice, made[choice][1] if choice in made else None) for error, choice in best]


def fold(
    layer: Layer,
    rank: int,
    rope_dim: int,
    choice: Choice = START,
    position_free: bool = True,
    turned: int = 0,
) -> LatentWeights:
    """One layer as latent attention.

    Args:
        rank: width `r` of the latent.
        rope_dim: width `R` of the rotary key, up to the G·D numbers at which it holds all keys; 0 where nothing turns.
        choice: see `Choice`; `first` slots of at most D numbers, not centred, are what stock `deepseek_v3` can say.
        position_free: whether heads have a part of the key without rotation; MFA has none.
        turned: how many keys turn whole, a constant and one for each of the latent's first numbers.

    Raises:
        ValueError: an odd or too large `rope_dim`, or a `rank` above the full rank of keys and values.
    """
    weights = layer.weights
    widest = weights.kv_heads * weights.head_dim
    if rope_dim % 2 or not 0 <= rope_dim <= widest:
        raise ValueError(f"rope_dim {rope_dim} must be even and between 0 and {widest}")
    if not 1 <= rank <= full_rank(weights.k.shape[-1], weights.kv_heads, weights.head_dim):
        raise ValueError(f"rank {rank} must lie between 1 and the full rank of keys and values")
    if not position_free:
        choice = replace(choice, balance=0.0)
    deviations = choice.centred and turned > 0
    chosen = (choice.slots, choice.picked, rope_dim, deviations)
    slots = layer.once("slots", chosen, lambda: rotary_slots(layer, rope_dim // 2, choice, deviations))
    values, gain = layer.rows[2], None
    if not turned:
        down, up_k, up_v = joint_latent(layer, slots.rest, values, rank, choice)
    else:

        def turn() -> tuple[Tensor, ...]:
            numbers, gain, rest = turned_keys(layer, slots.rest, min(turned, rank) - 1, choice.centred)
            read = layer.seen(values) @ layer.seen(numbers).mT  # what values read of these numbers, (G, D, J - 1)
            return numbers, gain, rest, read, values - read @ numbers

        numbers, gain, rest, read, unread = layer.once("turned", (slots.rest, min(turned, rank), choice.centred), turn)
        down, up_k, up_v = joint_latent(layer, rest, unread, rank - len(numbers), choice)
        down, up_k, up_v = torch.cat([layer.plain(numbers), down]), F.pad(up_k, (len(numbers), 0)), torch.cat([read, up_v], -1)
        gain = F.pad(gain, (0, 0, 0, 0, 0, turned - len(gain)))  # where fewer numbers say all
    folded = assemble(layer, slots, down, up_k, up_v, position_free, gain)
    # What a centred latent leaves out of the values is their mean.
    left_out = choice.centred and not choice.whole_values
    return replace(folded, o_bias=weights.o_bias_with(layer.mean(values))) if left_out else folded


@dataclass(frozen=True)
class RotarySlots:
    """Shared rotary keys: `key` (S, 2n) complex, turning with the source's frequencies `pairs` (S,); `gain` (G, S) complex, by
    which the queries of a key head are multiplied; and `rest` (G, D/2, 2n) complex, what they leave of every key."""

    key: Tensor
    pairs: Tensor
    gain: Tensor
    rest: Tensor


def rotary_slots(layer: Layer, slots: int, choice: Choice, deviations: bool = False) -> RotarySlots:
    """The best `slots` shared keys, each of one frequency: for the keys, or for their `deviations` from the mean.

    Per frequency, components are those of the complex PCA across key heads that minimises `Σ_g e_g^power E|k_g - u_g z|²`,
    `e_g` the mean query energy of key head g there. `choice.picked` says which components of which frequencies are kept.
    """
    per = layer.weights.heads // layer.weights.kv_heads
    pairs, gram = to_complex(layer.rows[1]), layer.key_covariance if deviations else layer.key_gram  # (G, D/2, 2n), (D/2, G, G)
    energy = layer.query_energy.unflatten(0, (-1, per)).mean(1).T  # (D/2, G)
    weight = energy.clamp_min(float(energy.amax()) * 1e-9 + torch.finfo(energy.dtype).tiny) ** (choice.slots / 2)
    sizes, vectors = torch.linalg.eigh(weight[..., None] * gram * weight[..., None, :])
    sizes, vectors = sizes.flip(-1), vectors.flip(-1)  # largest first: (D/2, G), (D/2, G, G)
    if choice.picked == "first":
        order = torch.arange(sizes.numel(), device=sizes.device).view(sizes.T.shape).T.flatten()  # component by component
        chosen = order.argsort()[:slots]
    else:
        lost = 1 - layer.phase.abs().square().mean(0) if choice.picked == "turning" else torch.ones_like(sizes[:, 0])
        chosen = (sizes * lost[:, None]).flatten().topk(slots).indices.sort().values
    frequency, component = chosen // sizes.shape[1], chosen % sizes.shape[1]
    shared, weight = vectors[frequency, :, component], weight[frequency]  # (S, G)
    read = shared.conj() * weight  # z = Σ_g read_g k_g, E|z|² = size, and k_g ≈ Σ_S (u_g / w_g) z
    before = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    size = sizes.maximum(sizes.amax() * 1e-12 + torch.finfo(sizes.dtype).tiny)[frequency, component]
    scale = (before[frequency] / size).sqrt().clamp_min(1e-12)[:, None]  # a gauge: keep keys' size
    key = scale * torch.einsum("sg,gsm->sm", read, pairs[:, frequency])
    back = (shared / weight / scale).T  # (G, S)
    rest = pairs.index_add(1, frequency, -back[..., None] * key)
    return RotarySlots(key, frequency, back.conj(), rest)


def turned_keys(layer: Layer, rest: Tensor, count: int, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What of the keys' rests (G, D/2, 2n) turns whole: `m_g0 + Σ_j c_j m_gj`, a constant where `centred`, and at most `count`
    numbers that mean most to the scores of what a position-free key loses.

    A constant takes nothing of the cache, for its rotation is the positions' alone. The first number usually tells the keys
    that attention rests on (attention sinks, 2309.17453) from all others, whose mean is another one.

    Returns:
        numbers `c` (count, 2n), gain `m` (count + 1, G, D), and what is left of the rests (G, D/2, 2n).
    """
    per = layer.weights.heads // layer.weights.kv_heads
    keys = from_complex(rest)  # (G, D, 2n)
    constant = layer.mean(keys) if centred else torch.zeros_like(keys[..., 0])
    keys = layer.deviations(keys) if centred else keys
    lost = layer.query_energy * (1 - layer.phase.abs().square()).clamp_min(0)  # (H, D/2)
    weight = lost.unflatten(0, (-1, per)).mean(1).sqrt().repeat(1, 2)[..., None]  # (G, D, 1)
    weighted = (weight * keys).flatten(0, 1)  # (G·D, 2n)
    whole = layer.seen((weight * layer.rows[1]).flatten(0, 1)).square().sum()
    if count == 0 or layer.seen(weighted).square().sum() <= 1e-12 * whole:
        return keys[0, :0], constant[None], to_complex(keys)
    numbers = left_singular(layer.seen(weighted), count).mT @ weighted
    numbers = numbers / layer.seen(numbers).norm(dim=1, keepdim=True)  # orthonormal
    read = layer.seen(keys) @ layer.seen(numbers).mT  # (G, D, count)
    gain = torch.cat([constant[None], read.permute(2, 0, 1)])
    return numbers, gain, to_complex(keys - read @ numbers)


def joint_latent(layer: Layer, rest: Tensor, values: Tensor, rank: int, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """One latent for the rests of all keys (G, D/2, 2n) and all values (G, D, 2n): see `weighted_latent`.

    Keys are weighted by the second moment of the queries that read them, turned by their coherence, so that the error is
    that of the scores.
    """
    keys = layer.once("rests", (rest,), lambda: from_complex(rest))
    return weighted_latent(layer, keys, values, layer.reading, rank, choice)


def weighted_latent(
    layer: Layer, keys: Tensor, values: Tensor, reading: tuple[Tensor, Tensor], rank: int, choice: Choice
) -> tuple[Tensor, Tensor, Tensor]:
    """One latent for what is asked of keys and of values (G, D, 2n each): the leading directions of their weighted second
    moment. Values are weighted by `(W_Oᵀ W_O)^power`, so that the error is that of the output.

    Args:
        reading: the keys' metric (G, D, D) and its inverse.

    Returns:
        down (r, n), up_k (G, D, r), up_v (G, D, r).
    """
    _, k, v = layer.rows
    root_k, inverse_k = reading
    powers = layer.once("importance", (choice.values,), lambda: power_and_inverse(layer.importance, choice.values / 2))
    root_v, inverse_v = powers

    def weighted(what: str, root: Tensor, rows: Tensor, whole: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (G·D, 2n) by their metric, the energy of the whole ones, and where that is smaller the Gram matrix (n, n)."""

        def make() -> tuple[Tensor, Tensor]:
            moved = (root @ rows).flatten(0, 1)
            moved = layer.deviations(moved) if centred else moved
            seen = layer.seen(moved)
            return moved, symmetric(seen, seen.mT) if few else symmetric(seen.mT, seen)

        def energy() -> Tensor:
            """Of the whole ones, so that a rest of nothing is given nothing."""
            return (root @ layer.seen(whole, centred)).square().sum().clamp_min(torch.finfo(rows.dtype).tiny)

        moved, gram = layer.once(what, (root, rows, centred), make)
        return moved, layer.once(f"energy of {what}", (root, centred), energy), gram

    few = 2 * values[..., 0].numel() <= len(layer.root)  # rows (2·G·D) of keys and values together
    moved_k, energy_k, gram_k = weighted("weighted keys", root_k, keys, k, choice.centred)
    moved_v, energy_v, gram_v = weighted("weighted values", root_v, values, v, choice.centred and not choice.whole_values)
    seen_k, seen_v = layer.seen(moved_k), layer.seen(moved_v)
    balance = (choice.balance * energy_v / energy_k).sqrt()
    if few:
        both = balance * layer.once("keys by values", (moved_k, moved_v), lambda: seen_k @ seen_v.mT)
        gram = torch.cat([torch.cat([balance**2 * gram_k, both], 1), torch.cat([both.mT, gram_v], 1)])
        basis = top_eigenvectors(gram, rank)  # (2·G·D, r)
        level = gauge(basis.mT, gram)
    else:
        near = layer.held.get("directions", ((), None))[1]
        found = leading_subspace(balance**2 * gram_k + gram_v, rank, near)
        layer.held["directions"] = (), found
        directions = found[:, :rank]
        held = torch.cat([balance * (seen_k @ directions), seen_v @ directions])
        basis, level = torch.linalg.qr(held).Q, gauge(held.mT)
    of_k, of_v = basis.chunk(2)
    down = (balance * of_k).mT @ layer.plain(moved_k) + of_v.mT @ layer.plain(moved_v)
    up_k, up_v = (part.unflatten(0, (-1, layer.weights.head_dim)) for part in (of_k, of_v))  # (G, D, r) each
    up_k = inverse_k @ up_k / (balance if choice.balance else 1.0)
    return down * level, up_k / level, inverse_v @ up_v / level


def assemble(
    layer: Layer,
    slots: RotarySlots,
    down: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    position_free: bool = True,
    gain: Tensor | None = None,
) -> LatentWeights:
    """The parts as one layer: queries absorb the slots' gains and the phases, and the change of the softmax's scale.

    Queries that read turned keys, too, of `gain` (J, G, D), leave the phases to the position-free keys.
    """
    weights = layer.weights
    per, width, rope_dim = weights.heads // weights.kv_heads, weights.head_dim, 2 * len(slots.key)
    queries, up_k = layer.plain(layer.rows[0]), up_k.repeat_interleave(per, 0)
    nope = width if position_free else 0
    scale = ((nope + rope_dim) / width) ** 0.5  # scores are divided by the new width's root

    def unturned() -> Tensor:
        turned = queries if gain is not None else from_complex(to_complex(queries) * layer.phase[..., None])
        return turned[:, :nope] * scale  # (H, N, n)

    free = layer.once("free queries", (gain is None, nope, scale), unturned)
    if gain is not None:
        up_k = from_complex(to_complex(up_k) * layer.phase.conj()[..., None])
    read = to_complex(queries[:, torch.cat([slots.pairs, slots.pairs + width // 2])])
    rotary = from_complex(read * (scale * slots.gain.repeat_interleave(per, 0)[..., None]))  # (H, R, n)
    cached = torch.cat([down, layer.plain(from_complex(slots.key))])  # (r + R, n)
    return LatentWeights(
        q_nope=free[..., :-1],
        q_rope=rotary[..., :-1],
        down=cached[: len(down), :-1],
        k_rope=cached[len(down) :, :-1],
        up_k=up_k[:, :nope],
        up_v=up_v.repeat_interleave(per, 0),
        o=weights.o,
        pairs=slots.pairs,
        q_bias=None if weights.q_bias is None else torch.cat([free[..., -1], rotary[..., -1]], 1),
        kv_bias=cached[:, -1] if cached[:, -1].any() else None,
        o_bias=weights.o_bias,
        turned=None if gain is None else gain.repeat_interleave(per, 1),
        **weights.softmax,
    )


def covariance(moment: Tensor) -> Tensor:
    """E[z zᵀ] without the mean: its last row and column are zero."""
    mean = moment[:, -1]
    return moment - mean[:, None] * mean


def low_rank_queries(folded: Queried, rank: int, moment: Tensor) -> Queried:
    """Queries of rank `m` (2405.04434, 2412.19255): the best map through `m` numbers of the input under its second moment.

    What the map loses of the queries' mean goes into their bias where they have one. Exact at full rank.
    """
    fields = ("q_nope", "q_rope") if isinstance(folded, LatentWeights) else ("q",)
    heads = torch.cat([getattr(folded, name) for name in fields], 1)  # (H, E, d)
    stacked = heads.flatten(0, 1)
    metric = moment[:-1, :-1] if folded.q_bias is None else covariance(moment)[:-1, :-1]
    basis = leading_directions(stacked, metric, rank)  # (H·E, m)
    down = basis.mT @ stacked
    level = gauge(down, moment[:-1, :-1])
    parts = (basis / level).unflatten(0, heads.shape[:2]).split([getattr(folded, name).shape[1] for name in fields], 1)
    bias = folded.q_bias
    if bias is not None:
        bias = bias + ((stacked - basis @ down) @ moment[:-1, -1]).view_as(bias)
    return replace(folded, **dict(zip(fields, parts, strict=True)), q_down=down * level, q_bias=bias)
