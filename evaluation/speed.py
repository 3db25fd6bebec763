"""Decoding: tokens per second and memory over context × batch, on the model as transformers runs it."""

import time
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.evaluation.layers import cached_tensors

NOTHING = {"tokens_per_second": None, "cache_bytes": None, "peak_memory_bytes": None}


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


def measure_speed(model: PreTrainedModel, window: int, grid: SpeedGrid, bytes_per_token: float) -> list[dict[str, Any]]:
    """Fill the cache with random tokens, then decode greedily.

    Args:
        window: tokens of the windows that the model is scored on; contexts are measured in halves and doubles of it.
        bytes_per_token: of the cache, to leave out what this machine's memory cannot hold where no error would tell.

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
            found = None
            if model.device.type == "cuda" or 2 * bytes_per_token * context * batch < psutil.virtual_memory().available:
                with suppress(torch.OutOfMemoryError):
                    found = _decode(model, context, batch, grid.steps)
            rows.append({"context": context, "batch": batch, **(found or NOTHING)})
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
