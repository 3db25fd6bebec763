"""Decoding: tokens per second and memory over context × batch, on the model as transformers runs it."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.evaluation.layers import cached_tensors


@dataclass(frozen=True)
class SpeedGrid:
    """Contexts of window, window/2, …; with `beyond`, doubled up to the model's positions as well."""

    contexts: int
    beyond: bool
    batches: tuple[int, ...]
    steps: int


GRIDS = {
    "quick": SpeedGrid(2, False, (1,), 8),
    "normal": SpeedGrid(3, False, (1, 8), 16),
    "full": SpeedGrid(3, True, (1, 8, 32), 32),
}


def measure_speed(model: PreTrainedModel, window: int, grid: SpeedGrid) -> list[dict[str, Any]]:
    """Fill the cache with random tokens, then decode greedily.

    Returns:
        For each context (cached tokens before the first step) and batch: `tokens_per_second` over the batch, from the
        median step; `cache_bytes`, the whole cache after the last step; and `peak_memory_bytes` with the weights, on CUDA,
        elsewhere None. Where memory does not suffice all three are None.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or window
    contexts = [window >> k for k in reversed(range(grid.contexts)) if window >> k >= 2]
    while grid.beyond and contexts[-1] * 2 <= limit:
        contexts.append(contexts[-1] * 2)
    rows = []
    for context in contexts:
        context = min(context, max(2, limit - grid.steps))  # no step goes past the positions that the model knows
        for batch in grid.batches:
            row: dict[str, Any] = {"context": context, "batch": batch}
            try:
                row |= _decode(model, context, batch, grid.steps)
            except torch.OutOfMemoryError:
                row |= {"tokens_per_second": None, "cache_bytes": None, "peak_memory_bytes": None}
            rows.append(row)
    return rows


@torch.no_grad()
def _decode(model: PreTrainedModel, context: int, batch: int, steps: int) -> dict[str, Any]:
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    shape, generator = (batch, context), torch.Generator().manual_seed(0)
    ids: Tensor = torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(model.device)
    out = model.base_model(ids, use_cache=True)
    cache, token = out.past_key_values, ids[:, -1:]
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        if on_cuda:
            torch.cuda.synchronize(model.device)
        seconds.append(time.perf_counter() - begun)
    return {
        "tokens_per_second": batch / median(seconds),
        "cache_bytes": sum(t.nbytes for t in cached_tensors(cache)),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(model.device) if on_cuda else None,
    }
