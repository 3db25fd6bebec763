"""The GPU benchmark of decoding, in miniature on CPU: that it times the source and every fold."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import serve_gpu


def test_it_times_the_source_and_every_fold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve_gpu, "COLD", 4096)
    folds = {
        "MLA": ("latent", {"rank": 12, "rope_dim": 4, "nope_dim": 8}),
        "MFA": ("latent", {"rank": 8, "rope_dim": 8, "nope_dim": 0}),
        "MFA-KR": ("reused-key", {"rope_dim": 16}),
    }
    size = serve_gpu.Size(hidden=32, heads=4, kv_heads=2, width=8, folds=folds)
    rows = serve_gpu.measure(size, [20, 33], [1, 3], "cpu", torch.float32)
    assert [(row["context"], row["batch"]) for row in rows] == [(20, 1), (20, 3), (33, 1), (33, 3)]
    assert all(row[name]["PyTorch"]["layer"] > 0 for row in rows for name in folds)
    assert all(row["source"]["layer"] > 0 < row["source"]["attention"] for row in rows)
    assert all((row["batch"] == 1) == ("prompt" in row) for row in rows)
    assert all(row["prompt"].keys() == {"source", *folds} and min(row["prompt"].values()) > 0 for row in rows[::2])
    assert len(capsys.readouterr().out.splitlines()) == 4
