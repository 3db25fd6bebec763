"""Queries and keys behind norms: folds are exact where they should be, token by token."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold.surgery import factorized, latent
from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.designs import FoldedWeights, design, weights_of
from kvfold.surgery.layer import Layer
from kvfold.surgery.norms import Linear, merged, paired
from kvfold.surgery.rebuilt import rebuilt
from kvfold.surgery.rope import from_complex, to_complex
from tests.test_latent import phase_of
from tests.test_surgery import HEADS, HIDDEN, KV_HEADS, WIDTH, inputs, moment_of, random_weights, rope_tables

KEYS = KV_HEADS * WIDTH


def normed(together: bool, bias: bool = False, behind: bool = False) -> AttentionWeights:
    """Random weights whose heads differ in size, behind norms of uneven weights, which may stand behind RoPE."""
    generator = torch.Generator().manual_seed(7)

    def weight(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator) * 2.7 + 0.3

    weights, heads = random_weights(bias=bias), ((HEADS, WIDTH), (KV_HEADS, WIDTH))
    q_norm, k_norm = (weight(*(shape if together else shape[1:])) for shape in heads)
    sizes = torch.arange(1.0, KV_HEADS + 1, dtype=torch.float64)[:, None, None]
    norm = torch.tensor([1e-6, together, behind], dtype=torch.float64)
    return replace(weights, k=weights.k * sizes, q_norm=q_norm, k_norm=k_norm, norm=norm)


def run(weights: FoldedWeights, x: Tensor) -> Tensor:
    with torch.no_grad():
        return design(weights)(x, rope_tables())[0]


def by_hand(weights: AttentionWeights, x: Tensor) -> Tensor:
    """The formula, head by head: x (B, T, d) → (B, T, d)."""
    cos, sin = rope_tables()
    eps, together, behind = weights.norm.tolist() if weights.norm is not None else (0.0, 0.0, 0.0)

    def turned(rows: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
        states = torch.einsum("hid,btd->bthi", rows, x) + (0 if bias is None else bias)
        mean = states.square().mean((2, 3) if together else 3, keepdim=True)
        states = states / (mean + eps).sqrt()
        states = states if behind else states * gain
        first, second = states.chunk(2, -1)
        states = states * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
        return states * gain if behind else states

    assert weights.q_norm is not None and weights.k_norm is not None
    q, k = turned(weights.q, weights.q_bias, weights.q_norm), turned(weights.k, weights.k_bias, weights.k_norm)
    v = torch.einsum("hid,btd->bthi", weights.v, x) + (0 if weights.v_bias is None else weights.v_bias)
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, 2) for part in (k, v))
    scores = torch.einsum("bthi,bshi->bhts", q, k) / WIDTH**0.5
    scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    out = torch.einsum("bhts,bshi,hdi->btd", scores.softmax(-1), v, weights.o)
    return out if weights.o_bias is None else out + weights.o_bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("together", "behind"), [(False, False), (True, False), (False, True)])
def test_the_source_and_every_design_at_full_width_are_the_formula(together: bool, behind: bool, bias: bool) -> None:
    weights, x = normed(together, bias, behind), inputs()
    wanted, moment, phase = by_hand(weights, x), moment_of(x), phase_of(weights, x)
    torch.testing.assert_close(run(weights, x), wanted, atol=1e-9, rtol=0)
    linear, with_queries = Linear(weights, moment), Linear(weights, moment, rebuilt=True)
    layer, plain = Layer(linear.weights, moment, phase), latent.Choice(0.0, 0.0, 0.3)
    folds: list[Any] = [
        linear.restored(latent.fold(layer, min(HIDDEN, 2 * KEYS), KEYS, plain)),
        linear.restored(latent.fold(layer, 3 * KEYS // 2, KEYS // 2, plain, turned=KEYS // 2 + 1)),
        linear.restored(factorized.mfa(layer, KEYS)),
        linear.restored(factorized.mfa_kr(layer, 2 * KEYS, replace(plain, still=0.5))),
        with_queries.restored(rebuilt(Layer(with_queries.weights, moment, phase), min(HIDDEN, 2 * KEYS))),
    ]
    for folded in folds:
        torch.testing.assert_close(run(folded, x), wanted, atol=1e-5, rtol=0)
        again = weights_of(design(folded))
        for name, tensor in folded.tensors().items():
            torch.testing.assert_close(getattr(again, name), tensor, atol=0, rtol=0)


@pytest.mark.parametrize("together", [False, True])
def test_keys_of_one_size_need_no_cached_scalars(together: bool) -> None:
    """Inputs of one size through matrices that turn them: every key of a head is as large as its others."""
    weights, x = normed(together), inputs()
    x = x / x[..., :WIDTH].square().mean(-1, keepdim=True).sqrt()
    generator = torch.Generator().manual_seed(5)
    keys = torch.zeros_like(weights.k)
    keys[:, :, :WIDTH] = torch.linalg.qr(torch.randn(KV_HEADS, WIDTH, WIDTH, dtype=torch.float64, generator=generator)).Q
    even = replace(weights, k=keys * torch.arange(1.0, KV_HEADS + 1, dtype=torch.float64)[:, None, None])
    folds: dict[str, tuple[float, float]] = {}
    for name, source in (("one size", even), ("many sizes", weights)):
        moment, phase, wanted = moment_of(x), phase_of(source, x), by_hand(source, x)
        errors = []
        for sized in (True, False):
            linear = Linear(source, moment, sized=sized)
            layer, plain = Layer(linear.weights, moment, phase), latent.Choice(0.0, 0.0, 0.3)
            folded = linear.restored(latent.fold(layer, min(HIDDEN, 2 * KEYS), KEYS, plain))
            module = design(folded)
            assert module.gains == ((1 if together else KV_HEADS) if sized else 0)
            assert (weights_of(module).k_raw is None) == (not sized)
            errors.append(float((run(folded, x) - wanted).abs().max()))
        folds[name] = errors[0], errors[1]
    assert max(folds["one size"]) < 1e-5 and folds["many sizes"][0] < 1e-5
    assert folds["many sizes"][1] > 1e-2


@pytest.mark.parametrize("behind", [False, True])
def test_heads_that_differ_by_what_a_norm_allows_are_merged_exactly(behind: bool) -> None:
    """Keys of a group are one key turned by a phase per frequency, at different sizes; weights are even within pairs."""
    weights, x = normed(together=False, behind=behind), inputs()
    generator = torch.Generator().manual_seed(3)
    angles = torch.rand(KV_HEADS, WIDTH // 2, dtype=torch.float64, generator=generator) * 6
    first = weights.k.unflatten(0, (2, -1))[:, :1].expand(-1, KV_HEADS // 2, -1, -1).flatten(0, 1)
    turn = torch.polar(torch.ones_like(angles), angles)[..., None]
    sizes = torch.arange(1.0, KV_HEADS + 1, dtype=torch.float64)[:, None, None]
    values = weights.v.unflatten(0, (2, -1))[:, :1].expand(-1, KV_HEADS // 2, -1, -1).flatten(0, 1)
    even = replace(
        weights,
        k=from_complex(to_complex(first) * turn) * sizes,
        v=values,
        q_norm=paired(weights.q_norm),  # type: ignore[arg-type]
        k_norm=paired(weights.k_norm),  # type: ignore[arg-type]
    )
    wanted = run(even, x)
    for method in ("align", "pca"):
        for _, folded in merged(method, even, 2, moment_of(x), torch.Generator()):
            assert folded.k.shape[0] == 2
            torch.testing.assert_close(run(folded, x), wanted, atol=1e-4, rtol=0)


def test_as_many_heads_as_before_change_nothing() -> None:
    weights, x = normed(together=False, behind=True), inputs()
    for method in ("mean", "first", "align", "pca"):
        for _, folded in merged(method, weights, KV_HEADS, moment_of(x), torch.Generator()):
            torch.testing.assert_close(run(folded, x), run(weights, x), atol=1e-9, rtol=0)
