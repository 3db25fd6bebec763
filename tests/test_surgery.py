"""The mathematics on tensors alone: every exact step is exact, every lossy one is as good as its objective says."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kvfold.surgery import grouping
from kvfold.surgery.attention import AttentionWeights, GroupedAttention
from kvfold.surgery.healing import Progress, heal, relative_error
from kvfold.surgery.kvfold_attention import Rope, rotate
from kvfold.surgery.lowrank import SecondMoment, power_and_inverse, square_root, symmetric, times_triangular
from kvfold.surgery.output import output_divergence
from kvfold.surgery.refit import RIDGE, OutputRegression
from kvfold.surgery.rope import from_complex, to_complex

HEADS, KV_HEADS, WIDTH, HIDDEN, TOKENS = 8, 4, 8, 48, 24


def random_weights(seed: int = 0, kv_heads: int = KV_HEADS, bias: bool = False) -> AttentionWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    return AttentionWeights(
        q=draw(HEADS, WIDTH, HIDDEN),
        k=draw(kv_heads, WIDTH, HIDDEN),
        v=draw(kv_heads, WIDTH, HIDDEN),
        o=draw(HEADS, HIDDEN, WIDTH),
        q_bias=draw(HEADS, WIDTH) if bias else None,
        k_bias=draw(kv_heads, WIDTH) if bias else None,
        v_bias=draw(kv_heads, WIDTH) if bias else None,
        o_bias=draw(HIDDEN) if bias else None,
    )


def rope_tables(tokens: int = TOKENS, width: int = WIDTH, theta: float = 10000.0) -> Rope:
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def inputs(seed: int = 1, rows: int = 4) -> Tensor:
    """Correlated inputs with a mean, so that covariances matter."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    mix = mix * torch.linspace(0.1, 2.0, HIDDEN, dtype=torch.float64)
    return torch.randn(rows, TOKENS, HIDDEN, generator=generator, dtype=torch.float64) @ mix + 0.2


def moment_of(x: Tensor) -> Tensor:
    moment = SecondMoment(x.shape[-1])
    moment.add(x)
    return moment.value()


def outputs(weights: AttentionWeights, x: Tensor) -> Tensor:
    with torch.no_grad():
        return GroupedAttention(weights)(x, rope_tables(x.shape[1]))[0]


def reference(weights: AttentionWeights, x: Tensor) -> Tensor:
    """Attention written out with complex numbers, position by position: what every exact step is compared with."""
    q, k, v = weights.augmented()
    x1 = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    frequencies = 10000.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    turn = torch.polar(torch.ones(TOKENS, WIDTH // 2, dtype=torch.float64), torch.arange(TOKENS)[:, None] * frequencies)
    out = torch.zeros_like(x)
    for h in range(weights.heads):
        g = h // (weights.heads // weights.kv_heads)
        queries = torch.einsum("btn,fn->btf", x1.to(torch.complex128), to_complex(q[h])) * turn
        keys = torch.einsum("btn,fn->btf", x1.to(torch.complex128), to_complex(k[g])) * turn
        scores = torch.einsum("btf,bsf->bts", queries, keys.conj()).real / WIDTH**0.5
        scores = scores.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -torch.inf)
        out += scores.softmax(-1) @ (x1 @ v[g].T) @ weights.o[h].T
    return out if weights.o_bias is None else out + weights.o_bias


def gauge(weights: AttentionWeights, seed: int = 5, scaled: bool = False) -> AttentionWeights:
    """The same layer in another basis: a phase (and a scale) per key head and frequency, a rotation per value head."""
    generator = torch.Generator().manual_seed(seed)
    n, per = weights.kv_heads, weights.heads // weights.kv_heads
    angle = torch.rand(n, WIDTH // 2, generator=generator, dtype=torch.float64) * 6.28
    size = 0.5 + torch.rand(n, WIDTH // 2, generator=generator, dtype=torch.float64) if scaled else torch.ones(n, WIDTH // 2)
    phase = torch.polar(size.double(), angle)
    turn = torch.linalg.qr(torch.randn(n, WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0]
    if scaled:
        turn = torch.randn(n, WIDTH, WIDTH, generator=generator, dtype=torch.float64) + 2 * torch.eye(WIDTH)
    q, k, v = weights.augmented()
    back = (1 / phase.conj()).repeat_interleave(per, 0)
    return weights.with_augmented(
        from_complex(to_complex(q) * back[..., None]),
        from_complex(to_complex(k) * phase[..., None]),
        turn @ v,
        weights.o @ torch.linalg.inv(turn).repeat_interleave(per, 0),
    )


def shared_heads(groups: int, bias: bool, seed: int = 3) -> AttentionWeights:
    """A layer of KV_HEADS key heads that hides only `groups` different ones, each member in the same basis."""
    few = random_weights(seed, groups, bias)
    size = KV_HEADS // groups

    def spread(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.repeat_interleave(size, 0)

    return AttentionWeights(
        few.q, few.k.repeat_interleave(size, 0), few.v.repeat_interleave(size, 0), few.o,
        few.q_bias, spread(few.k_bias), spread(few.v_bias), few.o_bias,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_attention_is_the_formula(bias: bool) -> None:
    weights, x = random_weights(bias=bias), inputs()
    torch.testing.assert_close(outputs(weights, x), reference(weights, x), atol=1e-12, rtol=0)


def test_grouped_attention_gives_its_weights_back() -> None:
    weights = random_weights(bias=True)
    again = GroupedAttention(weights).weights()
    for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias"):
        torch.testing.assert_close(getattr(again, name), getattr(weights, name), atol=0, rtol=0)


def test_rotation_is_a_complex_product() -> None:
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    cos, sin = rope_tables()
    turn = torch.complex(cos[:, : WIDTH // 2], sin[:, : WIDTH // 2])
    turned = to_complex(x[..., None])[..., 0] * turn
    torch.testing.assert_close(rotate(x[None], (cos, sin))[0], from_complex(turned[..., None])[..., 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_gauges_are_exact(bias: bool, scaled: bool) -> None:
    weights, x = random_weights(bias=bias), inputs()
    moved = gauge(weights, scaled=scaled)
    assert (moved.k - weights.k).abs().max() > 0.1
    torch.testing.assert_close(outputs(moved, x), outputs(weights, x), atol=1e-10, rtol=0)


def test_permuting_heads_is_exact() -> None:
    weights, x = random_weights(bias=True), inputs()
    moved = grouping.permute_heads(weights, [[2, 0], [3, 1]])
    torch.testing.assert_close(moved.k[0], weights.k[2], atol=0, rtol=0)
    torch.testing.assert_close(outputs(moved, x), outputs(weights, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["mean", "first", "align", "pca"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_folding_to_as_many_heads_changes_nothing(method: str, bias: bool, calibrated: bool) -> None:
    weights, x = random_weights(bias=bias), inputs()
    moment = moment_of(x) if calibrated else None
    for _, folded in grouping.candidates(method, weights, KV_HEADS, moment, torch.Generator()):
        torch.testing.assert_close(outputs(folded, x), outputs(weights, x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["align", "pca"])
def test_heads_that_differ_by_a_gauge_fold_exactly(method: str, groups: int, bias: bool) -> None:
    x = inputs()
    # align knows phases and rotations; pca, any complex-linear map per frequency and any invertible one of the values
    weights = gauge(shared_heads(groups, bias), scaled=method == "pca")
    for _, folded in grouping.candidates(method, weights, groups, moment_of(x), torch.Generator()):
        assert folded.k.shape == (groups, WIDTH, HIDDEN)
        torch.testing.assert_close(outputs(folded, x), outputs(weights, x), atol=1e-6, rtol=0)
    # the mean of raw heads is far off on the same layer
    mean = grouping.mean(weights, groups, None, torch.Generator())
    assert relative_error(outputs(mean, x), outputs(weights, x)) > 0.1


def test_mean_and_first_are_what_the_paper_says() -> None:
    weights = random_weights()
    mean = grouping.mean(weights, 2, None, torch.Generator())
    torch.testing.assert_close(mean.k[1], (weights.k[2] + weights.k[3]) / 2, atol=1e-15, rtol=0)
    torch.testing.assert_close(mean.v[0], (weights.v[0] + weights.v[1]) / 2, atol=1e-15, rtol=0)
    assert mean.q is not None and torch.equal(mean.q, weights.q) and torch.equal(mean.o, weights.o)
    first = grouping.first(weights, 2, None, torch.Generator())
    assert torch.equal(first.k, weights.k[[0, 2]]) and torch.equal(first.v, weights.v[[0, 2]])


def test_random_heads_have_the_scale_of_the_source_and_follow_the_seed() -> None:
    weights = random_weights()
    one, two, other = (grouping.random(weights, 2, None, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.k, two.k) and not torch.equal(one.k, other.k)
    assert one.k.std() / weights.k.std() == pytest.approx(1, abs=0.1)


def test_align_restores_the_norm() -> None:
    weights = random_weights()
    folded = grouping.align(weights, 1, None, torch.Generator())
    for merged, members in ((folded.k, weights.k), (folded.v, weights.v)):
        assert merged.norm() == pytest.approx(float(members.norm(dim=(1, 2)).mean()), rel=1e-9)


def test_pca_keys_are_the_best_rank_one() -> None:
    """With equal query energies the residual is what the SVD of the stacked complex keys leaves, frequency by frequency."""
    weights, x = random_weights(), inputs()
    moment = moment_of(x)
    ((_, folded),) = grouping.pca_candidates(weights, 1, moment, [(0.0, 0.0)])
    flat = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1).to(torch.complex128)
    _, k, _ = weights.augmented()
    _, shared, _ = folded.augmented()
    keys = torch.einsum("nc,gfc->fgn", flat, to_complex(k))
    merged = torch.einsum("nc,fc->fn", flat, to_complex(shared[0]))
    best = torch.linalg.svdvals(keys)[:, 1:].square().sum(-1)
    onto = torch.einsum("fgn,fn->fg", keys, merged.conj()) / merged.abs().square().sum(-1, keepdim=True)
    left = (keys - onto[..., None] * merged[:, None]).abs().square().sum((1, 2))
    torch.testing.assert_close(left, best, rtol=1e-8, atol=1e-8)


def test_pca_values_are_the_best_subspace() -> None:
    """With one head per value head and power 1 the lost output energy is the tail of the stacked outputs' spectrum."""
    weights, x = random_weights(kv_heads=HEADS), inputs()
    moment = moment_of(x)
    ((_, folded),) = grouping.pca_candidates(weights, 1, moment, [(0.0, 1.0)])
    flat = x.flatten(0, 1)
    roots, _ = power_and_inverse(weights.o.mT @ weights.o, 0.5)
    stacked = torch.cat([flat @ (r @ v).T for r, v in zip(roots, weights.v, strict=True)], dim=-1)
    best = torch.linalg.svdvals(stacked)[WIDTH:].square().sum()
    lost = sum((flat @ (weights.o[h] @ weights.v[h] - folded.o[h] @ folded.v[0]).T).square().sum() for h in range(HEADS))
    assert float(lost) == pytest.approx(float(best), rel=1e-6)


def test_similar_heads_find_each_other() -> None:
    """Twin heads, hidden by gauges and shuffled apart, end in one group."""
    x = inputs()
    twins = gauge(shared_heads(2, bias=False))
    apart = grouping.permute_heads(twins, [[0, 2, 1, 3]])
    groups = grouping.similar(apart, 2, moment_of(x))
    assert sorted(groups) == [[0, 2], [1, 3]]
    folded = grouping.pca(grouping.permute_heads(apart, groups), 2, moment_of(x), torch.Generator())
    torch.testing.assert_close(outputs(folded, x), outputs(apart, x), atol=1e-6, rtol=0)


def test_neighbours_refuse_what_does_not_divide() -> None:
    assert grouping.neighbours(4, 2) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="4 key heads do not divide into 3"):
        grouping.neighbours(4, 3)


def test_second_moment_is_the_mean_outer_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs()
    monkeypatch.setattr("kvfold.surgery.lowrank.AT_ONCE", 7)
    whole, parts = SecondMoment(HIDDEN), SecondMoment(HIDDEN)
    whole.add(x)
    for row in x:
        parts.add(row)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(whole.value()[:-1, :-1], flat.T @ flat / len(flat))
    torch.testing.assert_close(whole.value()[-1, :-1], flat.mean(0))
    torch.testing.assert_close(parts.value(), whole.value())
    with pytest.raises(ValueError, match="no calibration tokens"):
        SecondMoment(3).value()


@pytest.mark.parametrize("strip", [3, 4, 100])
def test_a_symmetric_product_is_the_product(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.surgery.lowrank.STRIP", strip)
    x = inputs().flatten(0, 1)
    weighted = x * torch.arange(1.0, len(x) + 1, dtype=x.dtype)[:, None]
    torch.testing.assert_close(symmetric(weighted.T, x), weighted.T @ x)
    torch.testing.assert_close(symmetric(x[:11], x[:11].T), x[:11] @ x[:11].T)
    lower = weighted[:HIDDEN].tril()
    torch.testing.assert_close(times_triangular(x, lower), x @ lower)


@pytest.mark.parametrize(("least", "off"), [(-5e-13, 1e-10), (-5e-8, 3e-6), (-5e-5, 1e-4)])
def test_a_moment_that_rounding_took_below_zero_has_a_triangular_root(least: float, off: float) -> None:
    """Far below zero it comes from eigenvectors."""
    values = torch.tensor([4.0, 2.0, least], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    moment = (turn * values) @ turn.T
    root = square_root(moment)
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T, moment, atol=off, rtol=0)


def test_healing_brings_a_broken_layer_back() -> None:
    """From noise on the weights towards the original: the error falls by far more than ten times."""
    weights, x = random_weights(), inputs(rows=16)
    target = outputs(weights, x)
    noisy = AttentionWeights(
        *(t + 0.1 * torch.randn(t.shape, dtype=t.dtype) for t in (weights.q, weights.k, weights.v, weights.o))
    )
    design, rope = GroupedAttention(noisy), rope_tables()
    losses = heal([lambda h: design(h, rope)[0]], [design], ((x, target) for _ in range(200)), steps=200)
    assert len(losses) == 200 and losses[-1] < losses[0] / 30


def test_healing_of_what_is_almost_exact_takes_small_steps() -> None:
    """A hundredth of the noise leaves a ten-thousandth of the error: full steps would begin by breaking more than there is."""
    weights, x = random_weights(), inputs(rows=16)
    target = outputs(weights, x)
    parts = (weights.q, weights.k, weights.v, weights.o)
    generator = torch.Generator().manual_seed(0)
    noisy = AttentionWeights(*(t + 0.001 * torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in parts))
    design, rope = GroupedAttention(noisy), rope_tables()
    losses = heal([lambda h: design(h, rope)[0]], [design], ((x, target) for _ in range(40)), steps=40)
    assert losses[-1] < losses[0] / 3 and max(losses) < 1.5 * losses[0]


def test_healing_stops_at_a_loss_that_is_not_finite() -> None:
    design, rope = GroupedAttention(random_weights()), rope_tables()
    x = inputs() * torch.nan
    with pytest.raises(FloatingPointError, match="step 1 of 3"):
        heal([lambda h: design(h, rope)[0]], [design], ((x, x) for _ in range(3)), steps=3)


def test_relative_error_counts_every_token_alike() -> None:
    target = torch.tensor([[1.0, 0.0], [1000.0, 0.0]])
    output = torch.tensor([[1.5, 0.0], [1500.0, 0.0]])
    assert float(relative_error(output, target)) == pytest.approx(0.25)


def test_a_token_of_weight_two_counts_as_two() -> None:
    x = inputs(rows=1)[0, :3]
    weighted, repeated = SecondMoment(HIDDEN), SecondMoment(HIDDEN)
    weighted.add(x, torch.tensor([2.0, 1.0, 0.0]))
    repeated.add(x[[0, 0, 1]])
    torch.testing.assert_close(weighted.value(), repeated.value())


def test_healing_does_not_see_the_scale_of_channels() -> None:
    """Two channels a thousand times as loud under weights a thousandth are the same layer, and heal by the same steps."""
    weights, x = random_weights(), inputs()
    rope, scale = rope_tables(), torch.ones(HIDDEN, dtype=torch.float64)
    scale[1], scale[4] = 1000.0, 1000.0
    scaled = replace(weights, **{name: getattr(weights, name) / scale for name in "qkv"})
    target = GroupedAttention(random_weights(seed=1))(x, rope)[0].detach()
    curves = []
    for form, seen in ((weights, x), (scaled, x * scale)):
        design = GroupedAttention(form)
        batches = ((seen, target) for _ in range(20))
        curves.append(heal([lambda h, design=design: design(h, rope)[0]], [design], batches, steps=20))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-6, atol=0.0)


def test_healing_goes_on_where_it_stood() -> None:
    weights, x = random_weights(), inputs()
    rope, target = rope_tables(), GroupedAttention(random_weights(seed=1))(x, rope_tables())[0].detach()
    whole = GroupedAttention(copy.deepcopy(weights))
    losses = heal([lambda h: whole(h, rope)[0]], [whole], ((x, target) for _ in range(8)), steps=8)
    saved: list[Any] = []

    def keep(progress: Progress) -> None:
        if progress.steps == 5:
            held = {name: p.detach().clone() for name, p in first.named_parameters()}
            saved.append((copy.deepcopy(progress), held))

    first = GroupedAttention(copy.deepcopy(weights))
    heal([lambda h: first(h, rope)[0]], [first], ((x, target) for _ in range(8)), steps=8, keep=keep)
    begun, parameters = saved[0]
    second = GroupedAttention(weights)
    second.load_state_dict(parameters)
    again = heal([lambda h: second(h, rope)[0]], [second], ((x, target) for _ in range(3)), steps=8, begun=begun)
    assert again == losses
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_output_is_refitted_by_least_squares() -> None:
    """The regression is that of the definition, and finds what an invertible map of the heads has hidden."""
    weights, x = random_weights(), inputs()
    mixed = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    folded = replace(weights, v=mixed @ weights.v)  # W_O does not know of it
    design, rope = GroupedAttention(folded), rope_tables()
    with torch.no_grad():
        wanted, heads = GroupedAttention(weights)(x, rope)[0], design.mix(x, rope)
        energy = x.square().sum(-1)
        regression = OutputRegression(heads.shape[-1], HIDDEN)
        for row in range(len(x)):  # piece by piece
            regression.add(heads[row], (wanted - design.o_proj(heads))[row], energy[row])
        for bias in (False, True):
            found = GroupedAttention(regression.solve(folded, bias))
            z = torch.cat([heads, torch.ones_like(heads[..., :1])], -1).flatten(0, 1) if bias else heads.flatten(0, 1)
            gram = (z / energy.flatten()[:, None]).T @ z
            ridge = torch.full((len(gram),), RIDGE * float(gram.diagonal()[: heads.shape[-1]].mean()), dtype=torch.float64)
            if bias:
                ridge[-1] = 0
            missing = (wanted - design.o_proj(heads)).flatten(0, 1)
            change = torch.linalg.solve(gram + ridge.diag(), (z / energy.flatten()[:, None]).T @ missing)
            torch.testing.assert_close(found(x, rope)[0], design.o_proj(heads) + (z @ change).view_as(wanted))
            before, after = relative_error(design(x, rope)[0], wanted), relative_error(found(x, rope)[0], wanted)
            assert float(after) < 0.1 * float(before)


def test_a_refit_that_float32_cannot_solve_is_solved_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, generator = random_weights(), torch.Generator().manual_seed(3)
    regression = OutputRegression(WIDTH, HIDDEN)
    heads, missing = (torch.randn(200, size, dtype=torch.float64, generator=generator) for size in (WIDTH, HIDDEN))
    regression.add(heads, missing, torch.ones(200, dtype=torch.float64))
    exact, single = regression.solve(weights, True), weights.to(torch.float32)
    torch.testing.assert_close(regression.solve(single, True).o, exact.o.float(), rtol=1e-4, atol=1e-5)
    whole = torch.linalg.cholesky_ex

    def failing(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return whole(-matrix)  # what is not positive definite

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    torch.testing.assert_close(regression.solve(single, True).o, exact.o.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_output_divergence_is_the_kl_and_its_gradient(cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.surgery.output.PIECE_BYTES", 10 * 4 * 11 * 3)  # pieces of three tokens
    generator = torch.Generator().manual_seed(0)
    hidden, reference = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    head = torch.randn(11, 7, generator=generator)
    hidden.requires_grad_()
    found = output_divergence(hidden, reference, head, cap)
    exact = hidden.detach().double().requires_grad_()
    logits = [h @ head.double().T for h in (exact, reference.double())]
    ours, theirs = ((x if cap is None else cap * torch.tanh(x / cap)).log_softmax(-1) for x in logits)
    wanted = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(wanted, exact)[0], rtol=1e-4, atol=1e-6)
