"""MFA, MFA-KR and rebuilt keys on tensors alone. Helpers and the source layers are those of test_surgery.py."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvfold.surgery.designs import FoldedWeights, design, weights_of
from kvfold.surgery.factorized import START, mfa, mfa_kr
from kvfold.surgery.healing import relative_error
from kvfold.surgery.latent import Choice, fold, low_rank_queries
from kvfold.surgery.layer import Layer
from kvfold.surgery.rebuilt import rebuilt
from tests.test_latent import layer_of, phase_of
from tests.test_surgery import HIDDEN, KV_HEADS, WIDTH, inputs, moment_of, outputs, random_weights, rope_tables

ALL_KEYS = KV_HEADS * WIDTH


def run(weights: FoldedWeights, x: Tensor) -> Tensor:
    with torch.no_grad():
        return design(weights)(x, rope_tables())[0]


@pytest.mark.parametrize("bias", [False, True])
def test_mfa_of_full_width_is_exact(bias: bool) -> None:
    weights, x = random_weights(bias=bias), inputs()
    folded = mfa(layer_of(weights, x), ALL_KEYS)
    assert folded.q_nope.shape[1] == 0
    torch.testing.assert_close(run(folded, x), outputs(weights, x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_mfa_kr_is_exact_where_the_key_holds_keys_and_values(bias: bool) -> None:
    weights, x = random_weights(bias=bias), inputs()
    folded = mfa_kr(layer_of(weights, x), 2 * ALL_KEYS)
    assert folded.key.shape == (2 * ALL_KEYS, HIDDEN)
    torch.testing.assert_close(run(folded, x), outputs(weights, x), atol=1e-5, rtol=0)


def test_one_key_head_needs_no_more_than_its_own_width() -> None:
    weights, x = random_weights(kv_heads=1), inputs()
    folded = mfa(layer_of(weights, x), WIDTH)
    torch.testing.assert_close(run(folded, x), outputs(weights, x), atol=1e-6, rtol=0)


def test_values_are_the_best_linear_reading_of_the_unrotated_key() -> None:
    """By least squares over the tokens."""
    weights, x = random_weights(bias=True), inputs()
    folded = mfa_kr(layer_of(weights, x), WIDTH, replace(START["mfa-kr"], still=0.0))
    flat = x.flatten(0, 1)
    key = flat @ folded.key.T + folded.k_bias
    per = len(weights.q) // KV_HEADS
    values = torch.einsum("gid,td->tgi", weights.v, flat) + weights.v_bias
    read = torch.einsum("hic,tc->thi", folded.up_v, key + folded.alpha * (key @ folded.reuse.T))[:, ::per]
    centred = [t - t.mean(0) for t in (key, values.flatten(1), read.flatten(1))]
    best = centred[0] @ torch.linalg.lstsq(centred[0], centred[1]).solution
    torch.testing.assert_close(centred[2], best, atol=1e-4, rtol=1e-4)


def test_mfa_kr_contains_mla_of_its_width() -> None:
    """With the same slots, the same latent reads the same rests, and values have more to be read from."""
    weights, x = random_weights(), inputs()
    moment, phase, wanted = moment_of(x), phase_of(weights, x), outputs(weights, x)
    choice = Choice(0.0, 0.0, 0.3, "energy", centred=True)
    latent = relative_error(run(fold(Layer(weights, moment, phase), 12, 8, choice), x), wanted)
    reused = relative_error(run(mfa_kr(Layer(weights, moment, phase), 20, replace(choice, still=0.6)), x), wanted)
    assert reused < latent


@pytest.mark.parametrize("bias", [False, True])
def test_rebuilt_keys_are_exact_at_full_rank(bias: bool) -> None:
    weights, x = random_weights(bias=bias), inputs()
    torch.testing.assert_close(run(rebuilt(layer_of(weights, x), HIDDEN), x), outputs(weights, x), atol=1e-6, rtol=0)


def test_rebuilt_keys_lose_less_than_latent_ones() -> None:
    weights, x = random_weights(), inputs()
    moment, phase, wanted = moment_of(x), phase_of(weights, x), outputs(weights, x)
    latent = relative_error(run(fold(Layer(weights, moment, phase), 12, 8), x), wanted)
    assert relative_error(run(rebuilt(Layer(weights, moment, phase), 20), x), wanted) < latent


def test_every_design_gives_its_weights_back() -> None:
    weights, x = random_weights(bias=True), inputs()
    layer, moment = layer_of(weights, x), moment_of(x)
    folds = [mfa(layer, 8), mfa_kr(layer, 8), rebuilt(layer, 8)]
    for folded in [*folds, *(low_rank_queries(f, 6, moment) for f in folds)]:
        again = weights_of(design(folded))
        assert again.tensors().keys() == folded.tensors().keys()
        for name, tensor in folded.tensors().items():
            torch.testing.assert_close(getattr(again, name), tensor, atol=0, rtol=0)


@pytest.mark.parametrize("width", [7, 0, 2 * ALL_KEYS + 2])
def test_widths_that_cannot_be_are_refused(width: int) -> None:
    weights, x = random_weights(), inputs()
    with pytest.raises(ValueError, match="must be even and between 2 and"):
        mfa_kr(layer_of(weights, x), width)


@pytest.mark.parametrize("rows", [1, 4])  # 24 tokens, of which 48 numbers have a singular moment, and 96
@pytest.mark.parametrize("iterated", [1, 3072])
def test_float32_folds_as_float64_does(rows: int, iterated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wide layers are folded in on a CPU: the same error to a thousandth, and nothing where nothing is left out."""
    monkeypatch.setattr("kvfold.surgery.lowrank.ITERATED", iterated)
    weights, x = random_weights(bias=True), inputs(rows=rows)
    exact, single = layer_of(weights, x), weights.to(torch.float32)
    quick = Layer(single, exact.moment, exact.phase.to(torch.complex64))
    every = KV_HEADS * WIDTH
    cases = [
        lambda layer: fold(layer, 6, 4, Choice(0.5, 1.0, 0.3)),
        lambda layer: fold(layer, 6, 4, Choice(0.0, 0.0, 3.0, picked="turning", centred=True), turned=2),
        lambda layer: mfa(layer, 8),
        lambda layer: mfa_kr(layer, 16),
        lambda layer: rebuilt(layer, 6),
        lambda layer: fold(layer, every, every, Choice(0.0, 0.0, 0.3)),
    ]
    for case in cases:
        folds = case(quick), case(exact)
        assert all(t.dtype == torch.float32 for t in folds[0].tensors().values() if t.is_floating_point())
        found, wanted = (float(relative_error(run(folded.to(torch.float64), x), outputs(weights, x))) for folded in folds)
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-10)
    assert wanted < 1e-10
