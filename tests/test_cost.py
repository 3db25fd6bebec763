"""What a conversion is said to take: operations as torch counts them, memory and disk refused at the start."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvfold.convert.methods import forms_tried
from kvfold.convert.pipeline import convert
from kvfold.convert.planning import cost
from kvfold.convert.planning.parameters import source_parameters
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.configfile import read_config
from kvfold.errors import UserError
from tests.helpers import invoke, save_model, save_tokens
from tests.test_plan import LLAMA_31_8B

PRODUCTS = ("stream", "float32", "float64", "healing", "attention")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("cost") / "source", "llama", num_key_value_heads=4)


@pytest.mark.parametrize(
    ("target", "healing"),
    [
        ({"to": "mla", "kv_budget": "25%", "layout": "kvfold"}, {"heal_steps": 0}),
        ({"to": "mla", "kv_rank": 16, "rope_dim": 8}, {"heal_steps": 20, "heal_window": "all"}),
        ({"to": "mqa"}, {"heal_steps": 10}),
    ],
)
def test_operations_are_about_those_that_torch_counts(
    source: Path, tmp_path: Path, target: dict[str, object], healing: dict[str, object]
) -> None:
    tokens = save_tokens(tmp_path / "t.safetensors", 64, 64)
    calibration = {"calibrate": tokens, "calibration_tokens": 4096, "window": 64, "heal_batch_tokens": 512}
    settings = ConvertSettings.model_validate({**target, **healing, **calibration})
    config = read_config(source)
    plan = make_plan(config, settings)
    work = cost.Cost(plan, source_parameters(config, plan.spec), 1e12, "cpu").steps(*forms_tried(plan))
    said = sum(part.get(kind, 0) for part in work.values() for kind in PRODUCTS)
    with FlopCounterMode(display=False) as counter:
        convert(str(source), tmp_path / "out", settings, check=False)
    counted = sum(counter.get_flop_counts()["Global"].values())
    assert 0.6 < said / counted < 1.6  # torch does not count all of attention


def test_a_plan_says_what_it_takes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    flags = ("--to", "mla", "--kv-budget", "25%", "--calibrate", "text.txt")
    code, text = invoke("plan", tmp_path, *flags, "--device-flops", "9.9e14", "--json", "-")
    assert code == 0
    said = json.loads(text)["cost"]
    assert list(said["steps"])[-1] == "healing" and said["seconds"] == pytest.approx(
        sum(step["seconds"] for step in said["steps"].values())
    )
    # 300 steps of 2,048 tokens through 7.0 billion parameters, forward and back, each layer twice: 80 GB do not hold them all
    assert 2 * 4 * 7.0e9 * 300 * 2048 < said["steps"]["healing"]["operations"] < 2 * 6 * 7.5e9 * 300 * 2048
    code, text = invoke("plan", tmp_path, *flags, "--calibration-tokens", 2048, "--device", "cpu")
    assert code == 0 and "in all" in text and "cpu, measured" in text
    if not torch.cuda.is_available():
        code, text = invoke("plan", tmp_path, *flags, "--device", "cuda")
        assert code == 2 and "--device cuda is not available here" in text
    code, text = invoke("plan", tmp_path, *flags)
    assert code == 0 and "in all" not in text


def test_too_little_memory_or_disk_is_refused_before_anything_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = save_tokens(tmp_path / "t.safetensors", 4, 24)
    settings = ConvertSettings(to="mqa", calibrate=tokens, window=24)
    free, usage = psutil.virtual_memory(), shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: free._replace(available=1 << 20))
        with pytest.raises(UserError, match=r"folding a layer takes about 0\.0 GiB of memory, and 0\.0 are free"):
            convert(str(source), tmp_path / "a" / "out", settings)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(UserError, match="1,000 bytes free and out needs about"):
            convert(str(source), tmp_path / "a" / "out", settings)
    assert not (tmp_path / "a").exists()


def test_the_gpu_benchmark_in_miniature(tmp_path: Path) -> None:
    """Conversions, uptraining and decoding, each with its numbers, on whatever device there is."""
    command = [
        sys.executable,
        str(Path(__file__).parent.parent / "benchmarks/gpu.py"),
        "--small",
        "--out",
        str(tmp_path / "found"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    converted, trained, decoded = ([r for r in found if r["what"] == what] for what in ("convert", "uptrain", "decode"))
    assert {r["job"] for r in converted} == {"mla", "mla, own layout", "mfa", "gqa"}
    assert all(r["folding_seconds_per_layer"] > 0 and r["healing_seconds_per_layer"] > 0 for r in converted)
    assert {r["recipe"] for r in trained} == {"distill-lora", "distill-attention", "ce-lora"}
    assert all(r["tokens_per_second"] > 0 for r in trained)
    sizes = {r["model"]: r["cache_bytes"] for r in decoded}
    assert sizes["MLA 12 + 4"] * 8 == sizes["source"]
    assert "MLA 12 + 4" in done.stdout.split("| ms per step")[1]
