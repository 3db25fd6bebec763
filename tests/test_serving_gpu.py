"""The decoding kernel, compiled: `make test-gpu`. Needs torch, Triton and a CUDA device, nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold.serving import latents, selfcheck
from kvfold.serving.latents import Shape
from kvfold.serving.paged import Layer, Step
from kvfold.surgery.kvfold_attention import DESIGNS, Rope

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = {
    "mla": Shape(32, 512, 64),
    "mla, wide": Shape(32, 960, 64),
    "mla, small, norms": Shape(9, 88, 8, gains=3),
    "mla of odd widths, soft caps and sinks": Shape(7, 51, 6, cap=5.0, sinks=True),
    "mla, turned keys": Shape(9, 88, 8, numbers=8, wide=64),
    "mfa": Shape(32, 256, 256, asks_first=False),
    "mfa-kr": Shape(32, 256, 256, halves=True),
    "mfa-kr of odd widths": Shape(5, 33, 33, halves=True),
}
ALLOWED = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_what_float64_gives(shape: str, dtype: torch.dtype) -> None:
    from kvfold.serving.kernel import attend as kernel

    for window in (None, 1000):
        case = selfcheck.example(SHAPES[shape], (1, 17, 1024, 8191), 16, dtype, torch.device("cuda"), window)
        for splits in (None, 1, 7):
            off = selfcheck.distance(kernel(SHAPES[shape], *case, splits=splits), SHAPES[shape], *case, torch.float64)
            assert off < ALLOWED[dtype], (window, splits)


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_passes_its_check(shape: str, dtype: torch.dtype) -> None:
    assert selfcheck.kernel(SHAPES[shape], 16, dtype, torch.device("cuda", 0)) is not None


def test_what_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from kvfold.serving import kernel

    right = kernel.attend
    monkeypatch.setattr(kernel, "attend", lambda *case: right(*case) * 1.1)
    assert selfcheck.kernel(Shape(8, 48, 16), 16, torch.float32, torch.device("cuda", 0)) is None
    assert "the kernel is 1.0e-01 off" in caplog.text


class Rotary(torch.nn.Module):
    """As transformers' rotary modules are called."""

    def forward(self, x: Tensor, positions: Tensor) -> Rope:
        angles = positions[..., None] * 0.7 ** torch.arange(32, device=positions.device)
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x), angles.sin().to(x)


@pytest.mark.parametrize(
    ("design", "widths"),
    [
        ("latent", {"rank": 88, "rope_dim": 8, "nope_dim": 64, "turned": 4}),
        ("latent", {"rank": 40, "rope_dim": 56, "nope_dim": 0, "norm": {"kv_heads": 3, "together": False, "eps": 1e-6}}),
        ("reused-key", {"rope_dim": 96}),
    ],
)
def test_layers_decode_in_it_as_in_pytorch(design: str, widths: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = DESIGNS[design](128, heads=9, value_dim=64, **widths).cuda().requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if name in ("turned_keys", "q_maps"):
            parameter.normal_(std=0.2)
    layer.rope_pairs[-1] = 32  # does not turn
    layer.rotary_emb = Rotary()
    lengths, page = [5, 300, 2000], 16
    shape = latents.shape_of(layer)
    assert shape is not None
    pages = torch.randn(3 * 125, page, shape.first + shape.second + shape.gains, device="cuda")
    table = torch.randperm(3 * 125, device="cuda").view(3, 125).int()
    last = torch.tensor(lengths, device="cuda") - 1
    slots = table.gather(1, (last // page)[:, None].long())[:, 0].long() * page + last % page
    x = torch.randn(3, 128, device="cuda")
    out = []
    for used in (True, False):
        if not used:
            monkeypatch.setattr(selfcheck, "kernel", lambda *_: None)
        step = Step([0, 1, 2, 3], lengths, table, slots)
        out.append(Layer(layer).attend(x, layer.rotary_emb(x, last), pages.clone(), step))
    torch.testing.assert_close(*out, atol=1e-4, rtol=1e-3)
