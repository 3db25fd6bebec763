"""The main job on a real model: stories260k, calibrated on `calibration`, measured on `evaluation`.

The bounds lie a little above what was measured with tokens counted by the attention they receive; `mean` must give the 3.118
nats that the paper's mean pooling gives on this model.
"""

from pathlib import Path
from typing import Any

import pytest

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings

GQA: dict[str, Any] = {"to": "gqa", "kv_heads": 2}
MQA: dict[str, Any] = {"to": "mqa"}
MLA_HALF: dict[str, Any] = {"to": "mla", "kv_rank": 24, "rope_dim": 8}
MLA_QUARTER: dict[str, Any] = {"to": "mla", "kv_rank": 8, "rope_dim": 8}
MFA: dict[str, Any] = {"to": "mfa", "width": 8}
MFA_KR: dict[str, Any] = {"to": "mfa-kr", "width": 16}
REBUILT: dict[str, Any] = {"to": "mla", "kv_rank": 16, "keys": "rebuilt"}
MEASURED: dict[str, Any] = {"to": "mla", "kv_budget": "12.5%", "layer_budgets": "measured"}


def damage(shared: Path, out: Path, **settings: Any) -> float:
    source = shared / "models/stories260k"
    if settings.get("method") != "mean":
        settings["calibrate"] = f"{source}/tokens.safetensors:calibration"
    convert(str(source), out, ConvertSettings(**settings))
    tokens = f"{source}/tokens.safetensors:evaluation"
    result = evaluate([str(out)], str(source), EvaluateSettings(on=tokens, batch=32, detail="damage"))
    assert result["source"]["nll"] == pytest.approx(1.2733, abs=1e-3)
    assert result["models"][0]["cache_numbers_per_token_per_layer"] <= 32
    return result["models"][0]["damage_nats"]


def test_mean_pooling_is_the_faithful_baseline(shared: Path, tmp_path: Path) -> None:
    assert damage(shared, tmp_path / "out", **GQA, method="mean") == pytest.approx(3.118, abs=0.01)


@pytest.mark.parametrize(
    ("method", "shape", "published"),
    [
        ("partial-rope-2norm", {"kv_rank": 8, "rope_dim": 8}, 3.412),
        ("rorope", MLA_QUARTER, 1.881),
        ("whitened", {"kv_rank": 16}, 1.080),
    ],
)
def test_published_methods_do_what_they_do_elsewhere(
    shared: Path, tmp_path: Path, method: str, shape: dict[str, Any], published: float
) -> None:
    """Within 4 % of the damage that the published methods do to this model: a baseline made worse would flatter us."""
    found = damage(shared, tmp_path / "out", **{**shape, "to": "mla", "method": method, "heal_steps": 0})
    assert found == pytest.approx(published, rel=0.04)


@pytest.mark.parametrize(
    ("target", "bound"),
    [
        (GQA, 0.40),
        (MQA, 0.95),
        (MLA_HALF, 0.13),
        (MLA_QUARTER, 0.85),
        (MFA, 0.93),
        (MFA_KR, 0.85),
        (REBUILT, 0.40),
        (MEASURED, 1.60),
    ],
)
def test_closed_form(shared: Path, tmp_path: Path, target: dict[str, Any], bound: float) -> None:
    assert damage(shared, tmp_path / "out", **target, heal_steps=0) <= bound


def test_healed_in_few_steps(shared: Path, tmp_path: Path) -> None:
    """100 steps of a quarter of the tokens already beat what 200 steps on the attention output reached (0.199)."""
    assert damage(shared, tmp_path / "out", **GQA, heal_steps=100, heal_window=2, heal_batch_tokens=1024) <= 0.19


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "bound"),
    [(GQA, 0.14), (MQA, 0.31), (MLA_HALF, 0.035), (MLA_QUARTER, 0.26), (MFA, 0.31), (MFA_KR, 0.15), (MEASURED, 0.7)],
)
def test_healed_with_the_defaults(shared: Path, tmp_path: Path, target: dict[str, Any], bound: float) -> None:
    assert damage(shared, tmp_path / "out", **target) <= bound
