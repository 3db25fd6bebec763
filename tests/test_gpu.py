"""On a CUDA device: `make test-gpu`."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.recipes.demo.demo import MODEL, write_texts
from tests.helpers import save_model, save_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_the_closed_form_is_that_of_the_cpu(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama")
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 64)
    ids = torch.arange(100)[None]
    logits = []
    for device in ("cpu", "cuda"):
        settings = ConvertSettings(to="gqa", kv_heads=2, calibrate=tokens, heal_steps=0, device=device)
        convert(str(source), tmp_path / device, settings)
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_pretrained(tmp_path / device)(ids).logits)
    torch.testing.assert_close(*logits, atol=1e-2, rtol=1e-2)


def test_healing_and_evaluation_on_the_device(tmp_path: Path) -> None:
    calibration, heldout = write_texts(tmp_path)
    damage = []
    for steps in (0, 100):
        out = tmp_path / f"healed-{steps}"
        settings = ConvertSettings(to="gqa", kv_heads=4, calibrate=str(calibration), heal_steps=steps, device="cuda")
        record = convert(str(MODEL), out, settings).record
        assert record["peak_cuda_memory_bytes"] > 0
        result = evaluate([str(out)], str(MODEL), EvaluateSettings(on=str(heldout), device="cuda"))
        damage.append(result["models"][0]["damage_nats"])
    assert damage[1] < damage[0] / 4
