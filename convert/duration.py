"""How long a conversion will take, said when its first layer is folded."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.convert.folding import OpenLayer


def training_seconds(item: OpenLayer, hidden: Tensor, autocast: torch.dtype | None) -> float:
    """Seconds of a forward and backward pass of a folded layer over `hidden` (B, T, d)."""

    def once() -> None:
        with torch.autocast(hidden.device.type, autocast, enabled=autocast is not None):
            total = item.block(hidden).float().sum()
        torch.autograd.grad(total, item.parameters)

    try:
        return seconds_of(once, hidden.device)
    except torch.OutOfMemoryError:
        if len(hidden) == 1:
            raise
    torch.cuda.empty_cache()  # behind the handler, whose exception holds on to what did not fit
    return 2 * training_seconds(item, hidden[: len(hidden) // 2], autocast)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, the second time it is done: the first one also makes buffers and loads kernels."""
    started = 0.0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.monotonic()
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - started


def announced(folding: float, healing: float) -> str:
    """The line that says how long it will take, from seconds."""
    if not healing:
        return f"folding will take about {spoken(folding)}"
    return (
        f"this will take about {spoken(folding + healing)}: folding {spoken(folding)}, healing {spoken(healing)} "
        "(fewer --heal-steps take less)"
    )


def spoken(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
