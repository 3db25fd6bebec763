"""How fast a device is at what a conversion does: measured in a second or two, or taken from its data sheet."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvfold.convert.planning.conversion_plan import ConversionPlan

if TYPE_CHECKING:
    import torch

SHARES = {
    "stream": 0.15,
    "float32": 0.1,
    "float64": 0.03,
    "healing": 0.3,
    "attention": 0.1,
    "eigen": 1e-4,
    "elements": 5e-4,
}
"""What a GPU is taken to do of the peak that its data sheet states for bfloat16. On an H200 (9.9e14) layers of an 8B took what
follows from these within a quarter: docs/numbers.md."""


def stated(flops: float) -> dict[str, float]:
    """Of a device that is not here, from its peak operations per second in bfloat16."""
    return {kind: share * flops for kind, share in SHARES.items()}


def measured(plan: ConversionPlan, device: "torch.device") -> dict[str, float]:
    """Operations of each kind per second on a device, from a test of a second or two. On the CPU it is the threads' own time
    that counts, so that a busy machine does not look like a slow one."""
    import torch

    from kvfold.convert.source.stream import forward_tokens, quickly
    from kvfold.surgery.kvfold_attention import attend

    spec, settings = plan.spec, plan.settings
    clock: Callable[[], float] = time.perf_counter
    if device.type == "cpu":
        clock = lambda: time.process_time() / torch.get_num_threads()  # noqa: E731

    def rate(amount: float, work: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(3):
            started = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, clock() - started)
        return amount / max(best, 1e-9)

    most, tokens = (4096, 8192) if device.type == "cuda" else (1024, 512)  # what fills the device
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as a conversion does
    wide, length = min(spec.hidden_size, most), min(settings.window, 512)
    x = torch.randn(tokens, wide, device=device)
    w, w64 = torch.randn(wide, 4 * wide, device=device), torch.randn(wide, 4 * wide, device=device, dtype=torch.float64)
    small = min(512, 2 * spec.kv_heads * spec.head_dim, spec.hidden_size)
    gram = w64[:small] @ w64[:small].T
    healing = getattr(torch, settings.heal_dtype)
    heads = torch.randn(max(1, tokens // length), spec.heads, length, spec.head_dim, device=device)
    gate = torch.randn(forward_tokens(device.type, spec.hidden_size), wide, device=device)

    def trained() -> None:
        read, weight = (t.to(healing).detach().requires_grad_() for t in (x, w))
        (read @ weight).sum().backward()

    def streamed() -> None:
        with quickly(x, spec.qkv_bias or spec.o_bias):
            torch.nn.functional.linear(x, w.T)

    def attended() -> None:
        with quickly(x, spec.qkv_bias or spec.o_bias):
            attend(heads, heads, heads, None, spec.head_dim**-0.5)

    return {
        "stream": rate(2 * tokens * w.numel(), streamed),
        "float32": rate(2 * tokens * w.numel(), lambda: x @ w),
        "float64": rate(2 * tokens * w.numel(), lambda: x.double() @ w64),
        "healing": rate(6 * tokens * w.numel(), trained),
        "attention": rate(4 * heads.numel() * length, attended),
        "eigen": rate(small**3, lambda: torch.linalg.eigh(gram)),
        "elements": rate(6 * gate.numel(), lambda: (torch.nn.functional.silu(gate) * gate).add_(1.0).softmax(-1)),
    }
