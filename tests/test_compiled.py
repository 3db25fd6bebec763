"""Healing through torch.compile: the same as without, once for every kind of layer, and as it is where that fails."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvfold.convert import compiled
from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from tests.helpers import save_model, save_tokens


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    compiled._passes.cache_clear()
    yield
    compiled._passes.cache_clear()
    torch.compiler.reset()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model(tmp_path / "source", "llama", num_hidden_layers=3)


def healed(tmp_path: Path, source: Path, name: str, window: Any = "all") -> dict[str, torch.Tensor]:
    settings = ConvertSettings(
        to="mla",
        kv_budget="25%",
        calibrate=save_tokens(tmp_path / "t.safetensors", 64, 32),
        heal_steps=6,
        heal_batch_tokens=128,
        heal_window=window,
        heal_lr=0.02,
        heal_dtype="float32",
    )
    record = convert(str(source), tmp_path / name, settings).record
    assert any(
        found["after"] < found["before"] for layer in record["layers"] for found in layer.values() if isinstance(found, dict)
    )
    return load_file(tmp_path / name / "model.safetensors")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler on a CPU")
@pytest.mark.parametrize("window", [pytest.param("all", marks=pytest.mark.slow), 2])
def test_compiled_healing_is_the_same(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, window: Any) -> None:
    plain = healed(tmp_path, source, "plain", window)
    monkeypatch.setattr(compiled, "PAYS", 0.0)
    kinds = torch._dynamo.utils.counters["stats"]
    kinds.clear()
    found = healed(tmp_path, source, "compiled", window)
    assert not compiled._passes().failed
    assert kinds["unique_graphs"] == 2  # all layers are of a kind, but nothing wants the gradient of what the first one reads
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert float((found[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name


def test_where_nothing_compiles_layers_run_as_they_are(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = healed(tmp_path, source, "plain")
    tried: list[int] = []

    def broken(*_: Any) -> torch.Tensor:
        tried.append(1)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "PAYS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    found = healed(tmp_path, source, "broken")
    assert tried == [1]
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_it_is_done_from_so_many_operations_on(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six for every parameter of the layers and token."""
    compiling: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda passed, **_: compiling.append(1) or passed)
    parameters = sum(t.numel() for name, t in load_file(source / "model.safetensors").items() if ".layers." in name)
    healed(tmp_path, source, "plain")
    assert not compiling
    monkeypatch.setattr(compiled, "PAYS", 6.0 * 6 * 128 * parameters)  # the source's layers have more than folded ones
    healed(tmp_path, source, "fewer")
    assert not compiling
    monkeypatch.setattr(compiled, "PAYS", 0.5 * 6 * 6 * 128 * parameters)
    healed(tmp_path, source, "more")
    assert compiling == [1]
