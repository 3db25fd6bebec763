"""Whether the kernel is right where it runs: compared with PyTorch's operations in float32 on a small cache, once per device.

Without Triton, off CUDA devices, or where it is not right, PyTorch's operations serve instead.
"""

import logging
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from kvfold.serving import latents
from kvfold.serving.latents import Asked, Attend, Cached, Shape

LENGTHS = (1, 37, 700)
ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How far off the kernel may be, of the norm of what is right: what rounding numbers to the cache's type makes, and some."""


@cache
def kernel(shape: Shape, page: int, dtype: torch.dtype, device: torch.device) -> Attend | None:
    """The kernel for layers of this shape; None, and a line in the log, where there is none that is right."""
    if device.type != "cuda":
        return None
    try:
        from kvfold.serving.kernel import attend, tiles
    except ImportError:
        return _without(shape, "Triton is not installed")
    if tiles(shape, dtype.itemsize) is None:
        return _without(shape, "no tile of the kernel holds it")
    try:
        off = error(shape, page, dtype, device, attend)
    except Exception as failure:  # Triton raises of its own and of CUDA's kinds
        return _without(shape, f"the kernel does not run on {torch.cuda.get_device_name(device)} ({type(failure).__name__})")
    if not off <= ALLOWED[dtype]:  # NaN too
        return _without(shape, f"the kernel is {off:.1e} off on {torch.cuda.get_device_name(device)}")
    return attend


def _without(shape: Shape, reason: str) -> Attend | None:
    width = shape.first + shape.second + shape.gains
    message = "kvfold: PyTorch's operations decode layers that cache %d numbers, for %s"
    logging.getLogger(__name__).warning(message, width, reason)
    return None


def error(shape: Shape, page: int, dtype: torch.dtype, device: torch.device, attend: Attend) -> float:
    """How far off `attend` is on random numbers, of the norm of what is right."""
    asked, cached = example(shape, LENGTHS, page, dtype, device)
    return distance(attend(shape, asked, cached), shape, asked, cached, torch.float32)


def distance(found: Tensor, shape: Shape, asked: Asked, cached: Cached, dtype: torch.dtype) -> float:
    """‖found - right‖ / ‖right‖, what is right being worked out in `dtype` of the same numbers."""
    right = latents.attend(shape, *exact(asked, cached, dtype))
    return float((found.to(dtype) - right).norm() / right.norm())


def exact(asked: Asked, cached: Cached, dtype: torch.dtype) -> tuple[Asked, Cached]:
    """The same numbers in another type."""
    queries = {name: getattr(asked, name) for name in ("first", "second", "turned", "sinks")}
    angles = None if cached.angles is None else (cached.angles[0].to(dtype), cached.angles[1].to(dtype))
    return (
        replace(asked, **{name: t.to(dtype) for name, t in queries.items() if t is not None}),
        replace(cached, pages=cached.pages.to(dtype), angles=angles),
    )


def example(
    shape: Shape,
    lengths: tuple[int, ...],
    page: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
    head_dim: int = 128,
) -> tuple[Asked, Cached]:
    """Random requests of these lengths. Their pages lie in disorder, and what is not written in them is not a number."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    longest, requests, width = max(lengths), len(lengths), shape.first + shape.second + shape.gains
    columns, counted = -(-longest // page), torch.tensor(lengths, device=device)
    table = torch.randperm(requests * columns, generator=generator, device=device).view(requests, columns)
    rows = normal(requests, columns * page, width)
    if shape.gains:
        rows[..., -shape.gains :] = rows[..., -shape.gains :].abs()
    rows[torch.arange(columns * page, device=device) >= counted[:, None]] = float("nan")
    pages = torch.empty(requests * columns, page, width, dtype=dtype, device=device)
    pages[table] = rows.unflatten(1, (columns, page))
    pairs, numbers = max(head_dim, shape.wide) // 2, (shape.numbers, shape.wide)
    turning = torch.arange(longest, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, pairs, device=device)
    angles = torch.cat([turning, turning], -1)
    asked = Asked(
        scale=(shape.first * shape.asks_first + shape.second) ** -0.5,
        first=normal(requests, shape.heads, shape.first) if shape.asks_first else None,
        second=normal(requests, shape.heads, shape.second) if shape.second else None,
        turned=normal(requests, shape.heads, *numbers) if shape.numbers else None,
        sinks=normal(shape.heads) if shape.sinks else None,
    )
    cached = Cached(
        pages,
        table.int(),
        counted.int(),
        longest,
        window,
        (angles.cos().to(dtype), angles.sin().to(dtype)) if shape.halves or shape.numbers else None,
        torch.randint(pairs + 1, (shape.second,), generator=generator, device=device) if shape.halves else None,
    )
    return asked, cached
