"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, parts of which are made then


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real material that is not part of the repository: `KVFOLD_SHARED`, or `../shared` beside it."""
    folder = Path(os.environ.get("KVFOLD_SHARED", Path(__file__).parent.parent.parent / "shared"))
    if not (folder / "models/stories260k").is_dir():
        pytest.skip(f"no models/stories260k under {folder}: set KVFOLD_SHARED to run this")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    from kvfold.recipes.demo.demo import MODEL

    return MODEL
