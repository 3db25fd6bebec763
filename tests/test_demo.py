"""The shipped demo model: what it is, and how far kvfold's default is ahead of mean pooling on it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.recipes.demo.corpus import CALIBRATION, HELDOUT, standard_library
from kvfold.recipes.demo.demo import FOLDS, UPTRAINED, demo_settings, run_demo, write_texts


def test_model_is_small_multi_head_and_bf16(demo_model: Path) -> None:
    reader = CheckpointReader(demo_model)
    assert (demo_model / "model.safetensors").stat().st_size <= 12e6
    assert reader.config["num_key_value_heads"] == reader.config["num_attention_heads"] == 8
    assert {e.dtype for e in reader.entries.values()} == {torch.bfloat16}
    assert json.loads((demo_model / "training.json").read_text())["heldout_bits_per_byte"] < 1.6


def test_calibration_and_heldout_text_do_not_meet() -> None:
    assert not set(CALIBRATION) & set(HELDOUT)
    training, heldout = standard_library(exclude=HELDOUT), standard_library(HELDOUT)
    assert not set(training) & set(heldout)
    assert set(standard_library(CALIBRATION)) <= set(training)
    assert len(heldout) >= len(HELDOUT)


def test_it_writes_python(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    ids = tokenizer("import os\nimport ", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])
    assert text.startswith(tokenizer.bos_token + "import os\nimport ")
    assert "import" in text.removeprefix(tokenizer.bos_token + "import os\nimport ")


def test_default_is_ten_times_better_than_mean_at_half_the_cache(demo_model: Path, tmp_path: Path) -> None:
    calibration, heldout = write_texts(tmp_path)
    for name in ("gqa-4-mean", "gqa-4", "gqa-4-healed"):
        convert(str(demo_model), tmp_path / name, ConvertSettings(**demo_settings(FOLDS[name], calibration)))
    outs = [str(tmp_path / name) for name in ("gqa-4-mean", "gqa-4", "gqa-4-healed")]
    result = evaluate(outs, str(demo_model), EvaluateSettings(on=str(heldout), max_tokens=16384, detail="quick"))
    mean, closed, healed = (model["damage_nats"] for model in result["models"])
    assert mean >= 10 * healed
    assert mean > closed > healed


@pytest.mark.slow
def test_whole_demo(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "demo")
    found = {Path(m["path"]).name: m["damage_nats"] for m in result["models"]}
    assert set(found) == {*FOLDS, *(f"{name}-uptrained" for name in UPTRAINED)}
    for target in UPTRAINED:
        assert found[f"{target}-uptrained"] < found[f"{target}-healed"] < found[target]
    for target in ("gqa-4", "gqa-2", "mqa"):
        assert found[f"{target}-healed"] < found[target]
    assert {m["stage"] for m in result["models"]} == {"closed form", "healed", "uptrained"}
    for name in ("report.md", "report.html", "plots/damage.png"):
        assert (tmp_path / "demo" / name).exists()
