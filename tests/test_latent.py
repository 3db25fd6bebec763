"""MLA's mathematics on tensors alone. Helpers and the source layers are those of test_surgery.py."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvfold.surgery.attention import AttentionWeights, GroupedAttention
from kvfold.surgery.constant import constant_direction, off_one, without_biases
from kvfold.surgery.designs import LatentWeights, design, weights_of
from kvfold.surgery.healing import relative_error
from kvfold.surgery.kvfold_attention import FoldedAttention, Rope
from kvfold.surgery.latent import (
    BIASED_START,
    FREE_START,
    START,
    Choice,
    attention_seen,
    coherence,
    fold,
    joint_latent,
    low_rank_queries,
    rotary_slots,
    search,
)
from kvfold.surgery.layer import Layer
from kvfold.surgery.lowrank import power_and_inverse, subspace_iteration
from kvfold.surgery.rope import from_complex, to_complex
from tests.test_surgery import HEADS, HIDDEN, KV_HEADS, TOKENS, WIDTH, inputs, moment_of, outputs, random_weights, rope_tables

FULL = 2 * KV_HEADS * WIDTH


def run(weights: LatentWeights, x: Tensor, rope: Rope | None = None) -> Tensor:
    with torch.no_grad():
        return design(weights)(x, rope or rope_tables())[0]


def still() -> Rope:
    """Rotary tables that rotate nothing: every frequency is zero."""
    return torch.ones(TOKENS, WIDTH, dtype=torch.float64), torch.zeros(TOKENS, WIDTH, dtype=torch.float64)


def phase_of(weights: AttentionWeights, x: Tensor) -> Tensor:
    return coherence(attention_seen(weights, x, rope_tables())[0], rope_tables())


def layer_of(weights: AttentionWeights, x: Tensor) -> Layer:
    return Layer(weights, moment_of(x), phase_of(weights, x))


@pytest.mark.parametrize("balance", [0.0, 0.3])
@pytest.mark.parametrize("slots", [0.0, 1.0])
def test_one_key_head_folds_exactly(slots: float, balance: float) -> None:
    """All rotation is in the slots, and the latent has room for the one value head."""
    weights, x = random_weights(kv_heads=1), inputs()
    folded = fold(layer_of(weights, x), WIDTH, WIDTH, Choice(slots, 1.0, balance))
    torch.testing.assert_close(run(folded, x), outputs(weights, x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("picked", ["first", "energy", "turning"])
@pytest.mark.parametrize("bias", [False, True])
def test_full_width_is_exact(picked: str, bias: bool) -> None:
    """Every component of every frequency has a slot, and the latent holds all values: biases and all."""
    weights, x = random_weights(bias=bias), inputs()
    choice = Choice(0.5, 1.0, 0.3, picked, centred=True)
    folded = fold(layer_of(weights, x), HIDDEN, KV_HEADS * WIDTH, choice)
    torch.testing.assert_close(run(folded, x), outputs(weights, x), atol=1e-6, rtol=0)


def with_constant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs along whose direction `w` all tokens are 1, and `w` (d,)."""
    w = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x + ((1 - x @ w) / (w @ w))[..., None] * w, w


def test_biases_are_read_off_a_constant_input_exactly() -> None:
    """One key head of rotary key and values at full width: nothing is lost, and no bias is left."""
    weights, (x, _) = replace(random_weights(kv_heads=1, bias=True), o_bias=None), with_constant(inputs())
    folded = fold(layer_of(weights, x), WIDTH, WIDTH, BIASED_START)
    assert folded.q_bias is not None and folded.kv_bias is not None and folded.o_bias is None
    w = constant_direction(moment_of(x))
    bare = without_biases(folded, w)
    assert (bare.q_bias, bare.kv_bias) == (None, None)
    assert off_one(w, moment_of(x)) < 1e-4
    torch.testing.assert_close(run(bare, x), outputs(weights, x), atol=1e-4, rtol=0)
    without = replace(folded, q_bias=None, kv_bias=None)
    assert relative_error(run(without, x), outputs(weights, x)) > 0.05, "the biases matter"


def test_the_direction_of_least_squares_is_nearly_constant() -> None:
    """Of noise beside a constant, `w·x` is off one by what the formula of the regression says."""
    generator = torch.Generator().manual_seed(6)
    x = 0.5 * torch.randn(20000, 3, generator=generator, dtype=torch.float64) + torch.tensor([2.0, 0.0, 1.0])
    moment = moment_of(x)
    w = constant_direction(moment)
    # E[x xᵀ] = m mᵀ + σ² I, so w = m / (|m|² + σ²), and the rest is σ² / (|m|² + σ²) in the mean square
    torch.testing.assert_close(w, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64) / 5.25, atol=0.02, rtol=0)
    assert off_one(w, moment) == pytest.approx((0.25 / 5.25) ** 0.5, rel=2e-2)
    assert off_one(w, moment) == pytest.approx(float((x @ w - 1).square().mean().sqrt()), rel=1e-9)


def test_values_keep_their_mean_where_the_output_has_no_bias() -> None:
    """A latent of deviations with a constant for the values: exact where it is as wide as what it holds."""
    weights, x = replace(random_weights(bias=True), o_bias=None), inputs()
    folded = fold(layer_of(weights, x), HIDDEN, KV_HEADS * WIDTH, replace(BIASED_START, picked="energy"))
    assert folded.o_bias is None
    torch.testing.assert_close(run(folded, x), outputs(weights, x), atol=1e-6, rtol=0)


def test_low_rank_queries_are_exact_at_full_rank_and_best_below() -> None:
    weights, x = random_weights(bias=True), inputs()
    choice = Choice(0.0, 0.0, 0.3, centred=True)
    folded = fold(layer_of(weights, x), 12, 8, choice)
    exact = low_rank_queries(folded, HIDDEN, moment_of(x))
    torch.testing.assert_close(run(exact, x), run(folded, x), atol=1e-6, rtol=0)
    half = low_rank_queries(folded, HIDDEN // 2, moment_of(x))

    def queries(of: LatentWeights) -> Tensor:
        module = design(of)
        assert isinstance(module, FoldedAttention)
        return module.queries(x).detach().transpose(1, 2).flatten(2).flatten(0, 1)

    lost = (queries(half) - queries(folded)).square().sum()
    centred = queries(folded) - queries(folded).mean(0)
    assert float(lost) == pytest.approx(float(torch.linalg.svdvals(centred)[HIDDEN // 2 :].square().sum()), rel=1e-4)


def test_without_rotation_full_rank_is_exact_for_any_number_of_heads() -> None:
    weights, x = random_weights(), inputs()
    unturned = torch.ones(HEADS, WIDTH // 2, dtype=torch.complex128)
    folded = fold(Layer(weights, moment_of(x), unturned), HIDDEN, 4)
    # the source without rotation, through the same module that test_surgery.py holds to the formula
    with torch.no_grad():
        wanted = GroupedAttention(weights)(x, still())[0]
    torch.testing.assert_close(run(folded, x, still()), wanted, atol=1e-6, rtol=0)


def test_what_the_slots_take_and_leave_adds_up() -> None:
    weights, x = random_weights(), inputs()
    layer = layer_of(weights, x)
    slots = rotary_slots(layer, 3, Choice(1.0, 0.0, 0.3))
    assert (slots.key.shape, slots.gain.shape) == ((3, 2 * (HIDDEN + 1)), (KV_HEADS, 3))
    assert slots.pairs.tolist() == [0, 1, 2]
    torch.testing.assert_close(slots.key[:, HIDDEN + 1 :], slots.key[:, : HIDDEN + 1] @ layer.root.to(slots.key))
    whole = slots.rest.clone()
    whole[:, :3] += slots.gain.conj()[..., None] * slots.key
    torch.testing.assert_close(layer.plain(from_complex(whole))[..., :-1], weights.k, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.plain(slots.rest)[:, 3:, :-1], to_complex(weights.k)[:, 3:], atol=0, rtol=0)


@pytest.mark.parametrize("centred", [False, True])
def test_keys_that_all_turn_whole_are_exact(centred: bool) -> None:
    """As many numbers as the shared rotary key leaves of the keys: the latent holds keys and values, and keys are rebuilt."""
    weights, x = random_weights(), inputs()
    keys, rank = KV_HEADS * WIDTH - 2, min(HIDDEN, 2 * KV_HEADS * WIDTH)
    folded = fold(layer_of(weights, x), rank, 2, replace(FREE_START, centred=centred), turned=keys + 1)
    assert folded.turned is not None and folded.turned.shape == (keys + 1, HEADS, WIDTH)
    torch.testing.assert_close(run(folded, x), outputs(weights, x), atol=1e-6, rtol=0)


def test_the_first_number_that_turns_tells_apart_what_differs_most() -> None:
    """Keys of two kinds, each the same but for its place: a constant and one number say all of them."""
    weights, x = random_weights(), inputs()
    kinds = x[0, :2]
    x = kinds[torch.arange(TOKENS) % 2].expand(len(x), -1, -1)
    folded = fold(layer_of(weights, x), 8, 2, FREE_START, turned=2)
    torch.testing.assert_close(run(folded, x), outputs(weights, x), atol=1e-6, rtol=0)
    without = fold(layer_of(weights, x), 8, 2, FREE_START)
    assert relative_error(run(without, x), outputs(weights, x)) > 1e-3


def test_the_joint_latent_is_the_best_of_its_rank() -> None:
    """The weighted error that is left is the tail of the spectrum, by an SVD over the tokens."""
    weights, x = random_weights(), inputs()
    layer, moment, phase = layer_of(weights, x), moment_of(x)[:-1, :-1], phase_of(weights, x)
    rank, choice = 10, Choice(0.0, 1.0, 0.3)
    rest = rotary_slots(layer, 2, choice).rest
    down, up_k, up_v = joint_latent(layer, rest, layer.rows[2], rank, choice)
    rest, down = layer.plain(rest)[..., :-1], layer.plain(down)[:, :-1]
    flat, per = x.flatten(0, 1), HEADS // KV_HEADS
    turned = from_complex(phase[..., None] * to_complex(weights.q))
    reading = (turned @ moment @ turned.mT).unflatten(0, (-1, per)).sum(1) / WIDTH
    importance = (weights.o.mT @ weights.o).unflatten(0, (-1, per)).sum(1)
    roots = power_and_inverse(reading, 0.5)[0], power_and_inverse(importance, 0.5)[0]
    keys, values = (flat @ (r @ w).flatten(0, 1).T for r, w in zip(roots, (from_complex(rest), weights.v), strict=True))
    whole = flat @ (roots[0] @ weights.k).flatten(0, 1).T
    balance = math.sqrt(choice.balance) * values.norm() / whole.norm()
    left = torch.linalg.svdvals(torch.cat([balance * keys, values], 1))[rank:].square().sum()
    latent = flat @ down.T
    lost_k = keys - latent @ (roots[0] @ up_k).flatten(0, 1).T
    lost_v = values - latent @ (roots[1] @ up_v).flatten(0, 1).T
    assert float((balance * lost_k).square().sum() + lost_v.square().sum()) == pytest.approx(float(left), rel=1e-6)
    assert float(latent.square().mean()) == pytest.approx(1.0)  # what the layouts count on


def test_coherence_is_the_expected_phase() -> None:
    weights, x = random_weights(), inputs()
    lags, received = attention_seen(weights, x, rope_tables())
    assert float(received.sum()) == pytest.approx(len(x) * TOKENS * HEADS)  # every query gives all that it has
    torch.testing.assert_close(lags.sum(), received.sum() - received[:, 0].sum())  # the sink apart
    # by hand for one head: attention from its definition, then the mean of e^{j f (t - s)} over it
    h, g = 3, 3 // (HEADS // KV_HEADS)
    frequencies = 10000.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    turn = torch.polar(torch.ones(TOKENS, WIDTH // 2, dtype=torch.float64), torch.arange(TOKENS)[:, None] * frequencies)
    q, k = (torch.einsum("btn,fn->btf", x.to(torch.complex128), to_complex(w)) * turn for w in (weights.q[h], weights.k[g]))
    scores = torch.einsum("btf,bsf->bts", q, k.conj()).real / WIDTH**0.5
    attention = scores.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    attention[:, :, 0] = 0  # the sink is left out
    wanted = torch.einsum("bts,tf,sf->f", attention.to(turn.dtype), turn, turn.conj()) / attention.sum()
    torch.testing.assert_close(coherence(lags, rope_tables())[h], wanted)


def test_turning_by_the_coherence_helps() -> None:
    """What makes keys position-free is better with the measured phase than with none."""
    weights, x = random_weights(), inputs()
    wanted, moment = outputs(weights, x), moment_of(x)
    measured = fold(layer_of(weights, x), HIDDEN, 4)
    unturned = fold(Layer(weights, moment, torch.ones(HEADS, WIDTH // 2, dtype=torch.complex128)), HIDDEN, 4)
    assert relative_error(run(measured, x), wanted) < 0.9 * relative_error(run(unturned, x), wanted)


def test_more_rank_means_less_error() -> None:
    weights, x = random_weights(), inputs()
    phase, moment, wanted = phase_of(weights, x), moment_of(x), outputs(weights, x)
    errors = [float(relative_error(run(fold(Layer(weights, moment, phase), r, WIDTH), x), wanted)) for r in (4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 1.5


def test_search_returns_what_it_measured_as_best() -> None:
    weights, x = random_weights(), inputs()
    seen: list[float] = []

    def measure(folded: LatentWeights) -> float:
        seen.append(float(relative_error(run(folded, x), outputs(weights, x))))
        return seen[-1]

    phase = phase_of(weights, x)
    best, second = search(lambda choice: fold(Layer(weights, moment_of(x), phase), 12, 4, choice), measure)
    error, choice, folded = best
    assert [error, second[0]] == sorted(seen)[:2]
    assert len(seen) == 9
    again = fold(layer_of(weights, x), 12, 4, choice)
    assert folded is not None
    torch.testing.assert_close(again.down, folded.down)

    left: list[Choice] = []

    def every_second(choices: Sequence[Choice], work: Callable[[int, Choice], float]) -> list[float]:
        """As the second of two processes: what the first one measures comes without weights."""
        left.extend(choices[::2])
        others = [measure(fold(layer_of(weights, x), 12, 4, each)) for each in choices[::2]]
        found = [work(number, each) for number, each in enumerate(choices) if number % 2 == 1]
        return [(others, found)[number % 2][number // 2] for number in range(len(choices))]

    shared = search(lambda each: fold(Layer(weights, moment_of(x), phase), 12, 4, each), measure, spread=every_second)
    assert [entry[:2] for entry in shared] == [best[:2], second[:2]]
    assert sum(entry[2] is None for entry in shared) == sum(entry[1] in left for entry in shared) > 0


def test_latent_attention_gives_its_weights_back() -> None:
    weights, x = random_weights(), inputs()
    folded = replace(fold(layer_of(weights, x), 12, 4), o_bias=torch.randn(HIDDEN, dtype=torch.float64))
    again = weights_of(design(folded))
    for name in folded.tensors():
        torch.testing.assert_close(getattr(again, name), getattr(folded, name), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("rank", "rope_dim", "words"),
    [
        (0, 4, "rank 0 must lie between 1 and the full rank"),
        (FULL + 1, 4, "full rank"),
        (8, 3, "rope_dim 3 must be even"),
        (8, KV_HEADS * WIDTH + 2, f"between 0 and {KV_HEADS * WIDTH}"),
    ],
)
def test_what_cannot_be_is_refused(rank: int, rope_dim: int, words: str) -> None:
    weights = random_weights()
    phase = torch.ones(HEADS, WIDTH // 2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=words):
        fold(Layer(weights, moment_of(inputs()), phase), rank, rope_dim, START)


def test_a_layer_keeps_its_rows_and_what_the_inputs_make_of_them() -> None:
    """Against means over the tokens themselves."""
    weights, x = random_weights(bias=True), inputs()
    layer, z = layer_of(weights, x), torch.cat([x.flatten(0, 1), x.new_ones(x[..., 0].numel(), 1)], 1)
    q, k, _ = layer.rows
    keys = (z @ layer.plain(k).flatten(0, 1).T).unflatten(1, k.shape[:2])  # (T, G, D)
    torch.testing.assert_close(layer.mean(k), keys.mean(0))
    wanted = torch.einsum("tgi,tgj->gij", keys, keys) / len(z)
    torch.testing.assert_close(layer.seen(k) @ layer.seen(k).mT, wanted)
    spread = torch.einsum("tgi,tgj->gij", keys - keys.mean(0), keys - keys.mean(0)) / len(z)
    for centred in (layer.seen(k, centred=True), layer.seen(layer.deviations(k))):
        torch.testing.assert_close(centred @ centred.mT, spread, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(
        (z @ layer.plain(layer.deviations(k)).flatten(0, 1).T).unflatten(1, k.shape[:2]), keys - keys.mean(0)
    )
    queries = (z @ layer.plain(q).flatten(0, 1).T).unflatten(1, q.shape[:2])
    energy = to_complex(queries[..., None])[..., 0].abs().square().mean(0)
    torch.testing.assert_close(layer.query_energy, energy)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 2e-4), (torch.float32, 5e-4)])
@pytest.mark.parametrize("first", [1.0, 1e4])
@pytest.mark.parametrize("decay", [0.3, 1.0])
def test_subspace_iteration_holds_what_the_leading_eigenvectors_hold(
    decay: float, first: float, dtype: torch.dtype, far: float
) -> None:
    """One eigenvalue above all others must not drown the rest, and what is near may lack whole directions."""
    basis = torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    values = torch.arange(1, 401, dtype=torch.float64) ** (-2 * decay)
    values[0] = first
    matrix = (basis * values) @ basis.T
    rounding = 100 * torch.finfo(dtype).eps

    def lost(found: Tensor) -> float:
        found = found[:, :40].to(torch.float64)
        torch.testing.assert_close(found.T @ found, torch.eye(40, dtype=torch.float64), atol=rounding, rtol=0)
        found = torch.linalg.qr(found).Q
        return float(values[:40].sum() - (found * (matrix @ found)).sum())

    limit = far * float(values[40:].sum()) + 10 * first * torch.finfo(dtype).eps
    assert abs(lost(subspace_iteration(matrix.to(dtype), 40))) < limit
    others = (basis[:, 100:] * values[:300]) @ basis[:, 100:].T
    near = subspace_iteration(others.to(dtype), 40)
    assert abs(lost(subspace_iteration(matrix.to(dtype), 40, near))) < limit
