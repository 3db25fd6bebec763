"""The decoding kernel: in Triton's interpreter on CPU, compiled in tests/test_serving_gpu.py."""

import sys
from typing import Any

import pytest
import torch

from kvfold.serving import selfcheck
from kvfold.serving.latents import Shape
from tests import test_serving

if torch.cuda.is_available():
    pytest.skip("tests/test_serving_gpu.py compiles it", allow_module_level=True)
kernel = pytest.importorskip("kvfold.serving.kernel", reason="Triton is not installed", exc_type=ImportError)

SHAPES = {
    "mla": Shape(18, 72, 10),
    "mla of odd widths and a norm": Shape(9, 21, 6, gains=3),
    "mla without a rotary key, soft caps and sinks": Shape(6, 20, 0, cap=1.5, sinks=True),
    "turned keys": Shape(4, 40, 8, numbers=3, wide=24),
    "mfa": Shape(18, 17, 33, asks_first=False),
    "mfa-kr": Shape(9, 44, 44, halves=True, gains=1),
}


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_what_pytorch_gives_in_float64(shape: str, window: int | None) -> None:
    """Cut into several splits, of which some are empty."""
    case = selfcheck.example(SHAPES[shape], (1, 40, 67), 8, torch.float32, torch.device("cpu"), window, head_dim=48)
    for splits in (1, 3):
        found = kernel.attend(SHAPES[shape], *case, splits=splits)
        assert selfcheck.distance(found, SHAPES[shape], *case, torch.float64) < 2e-6


def test_it_takes_half_precision() -> None:
    shape = SHAPES["turned keys"]
    case = selfcheck.example(shape, (3, 40), 16, torch.float16, torch.device("cpu"))
    found = kernel.attend(shape, *case, splits=2)
    assert found.dtype == torch.float16
    assert selfcheck.distance(found, shape, *case, torch.float64) < 1e-2


@pytest.mark.parametrize("shape", [name for name in test_serving.SHAPES if "rebuilt" not in name])
def test_requests_that_decode_in_it_go_on_as_whole_sequences(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a prompt, with and without a window."""
    called = []

    def counted(*case: Any) -> torch.Tensor:
        called.append(case)
        return kernel.attend(*case)

    monkeypatch.setattr(selfcheck, "kernel", lambda *_: counted)
    for window in (None, 5):
        test_serving.test_pages_of_several_requests_give_what_whole_sequences_give(shape, window)
    assert called


def test_without_a_kernel_that_is_right_a_line_says_what_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    assert selfcheck.kernel(Shape(8, 3000, 64), 16, torch.bfloat16, device) is None
    monkeypatch.setattr(selfcheck, "error", lambda *_: float("nan"))
    assert selfcheck.kernel(Shape(8, 300, 64), 16, torch.bfloat16, device) is None
    monkeypatch.setattr(selfcheck, "error", lambda *_: 0.5)
    assert selfcheck.kernel(Shape(8, 30, 64), 16, torch.bfloat16, device) is None
    monkeypatch.setattr(selfcheck, "error", lambda *_: 0.005)
    assert selfcheck.kernel(Shape(8, 20, 64), 16, torch.bfloat16, device) is kernel.attend
    monkeypatch.setitem(sys.modules, "kvfold.serving.kernel", None)
    assert selfcheck.kernel(Shape(8, 10, 64), 16, torch.bfloat16, device) is None
    said = [record.message.removeprefix("kvfold: PyTorch's operations decode layers that cache ") for record in caplog.records]
    assert said == [
        "3064 numbers, for no tile of the kernel holds it",
        "364 numbers, for the kernel is nan off on a device",
        "94 numbers, for the kernel is 5.0e-01 off on a device",
        "74 numbers, for Triton is not installed",
    ]
