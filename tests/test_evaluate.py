"""The measures are what they say: against transformers' own loss, and on models whose answer is known."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.evaluation import damage, report
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.layers import attention_errors, measure_cache
from kvfold.evaluation.settings import EvaluateSettings
from tests.helpers import save_model, save_tokens

IDS = torch.randint(128, (5, 48), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    source = save_model(folder / "source", "llama")
    convert(str(source), folder / "mqa", ConvertSettings(to="mqa", method="mean"))
    return source, folder / "mqa"


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def scored(source: torch.nn.Module, model: torch.nn.Module, batch: int) -> damage.TokenScores:
    states = [damage.final_states(m, IDS, batch) for m in (source, model)]
    return damage.score(source, states[0], model, states[1], IDS)


def test_nll_is_the_loss_of_transformers(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = map(load, pair)
    with torch.no_grad():
        wanted = model(IDS, labels=IDS).loss.item()
    whole = scored(source, model, 2)
    assert whole.mean_nll == pytest.approx(wanted, abs=1e-6)
    assert whole.nll.shape == (5, 47)
    monkeypatch.setattr(damage, "HEAD_TOKENS", 7)
    chunked = scored(source, model, 5)
    torch.testing.assert_close(chunked.nll, whole.nll, atol=1e-5, rtol=0)


def test_kl_and_agreement_are_those_of_the_distributions(pair: tuple[Path, Path]) -> None:
    source, model = map(load, pair)
    scores = scored(source, model, 5)
    with torch.no_grad():
        p, q = (m(IDS).logits[:, :-1].double().log_softmax(-1) for m in (source, model))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(scores.kl.double(), kl, atol=1e-5, rtol=1e-4)
    assert scores.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_a_model_against_itself_is_unharmed(pair: tuple[Path, Path]) -> None:
    source = load(pair[0])
    scores = scored(source, source, 5)
    assert scores.mean_kl < 1e-7
    assert scores.top1_agreement == 1.0
    assert attention_errors(source, source, IDS) == pytest.approx([0.0] * len(source.model.layers), abs=1e-12)


def test_attention_error_is_relative(pair: tuple[Path, Path]) -> None:
    """An output projection of zero loses everything, half of it a quarter of the energy."""
    source, model = load(pair[0]), load(pair[0])
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.mul_(0.5)
    errors = attention_errors(source, model, IDS)
    assert errors[0] == pytest.approx(1.0)
    assert errors[1] == pytest.approx(0.25, abs=1e-6)


def test_cache_is_counted_in_a_real_generation(pair: tuple[Path, Path]) -> None:
    source, model = map(load, pair)
    layers, heads = len(source.model.layers), source.config.num_key_value_heads
    assert measure_cache(source, IDS[:1, :10]) == (2 * heads * 8, 2 * heads * 8 * 4 * layers)
    assert measure_cache(model, IDS[:1, :10]) == (2 * 1 * 8, 2 * 1 * 8 * 4 * layers)


def test_latent_checkpoints_are_measured_like_any_other(tmp_path: Path) -> None:
    """One key head folds into MLA exactly, so nothing is lost, and the cache holds the latent."""
    source = save_model(tmp_path / "source", "llama", num_key_value_heads=1)
    tokens = save_tokens(tmp_path / "t.safetensors", 6, 40)
    settings = ConvertSettings(to="mla", kv_rank=12, rope_dim=8, calibrate=tokens, heal_steps=0)
    convert(str(source), tmp_path / "mla", settings)
    (found,) = evaluate([str(tmp_path / "mla")], str(source), EvaluateSettings(on=tokens))["models"]
    assert abs(found["damage_nats"]) < 1e-4
    assert max(found["attention_errors"]) < 1e-6
    assert found["cache_numbers_per_token_per_layer"] == 20


def test_report_holds_what_was_measured(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    tokens = save_tokens(tmp_path / "t.safetensors", 6, 40)
    result = evaluate([str(out), str(source)], str(source), EvaluateSettings(on=tokens))
    folded, same = result["models"]
    assert result["tokens"] == 6 * 39
    assert folded["damage_nats"] == pytest.approx(folded["nll"] - result["source"]["nll"])
    assert abs(same["damage_nats"]) < 1e-9
    assert folded["perplexity"] == pytest.approx(math.exp(folded["nll"]))
    assert folded["conversion"]["settings"]["method"] == "mean"
    assert same["conversion"] is None
    assert len(folded["attention_errors"]) == len(load(out).model.layers)
    paths = report.write(result, tmp_path / "report")
    assert json.loads(paths[0].read_text()) == result
    text = paths[1].read_text()
    assert f"{folded['damage_nats']:+.4f}" in text
    assert f"{folded['kl']:.4f}" in text
    # the source named in kvfold.json is found without --against
    again = evaluate([str(out)], None, EvaluateSettings(on=tokens))
    assert again["models"][0]["nll"] == pytest.approx(folded["nll"], abs=1e-9)


def test_bits_per_byte() -> None:
    scores = damage.TokenScores(torch.full((2, 3), math.log(2) * 3), torch.zeros(2, 3), torch.ones(2, 3))
    assert scores.bits_per_byte(1.5) == pytest.approx(2.0)
    assert scores.bits_per_byte(None) is None
