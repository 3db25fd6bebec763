"""Needle retrieval: does the model still find a passage that stands somewhere in its context?

A passage of held-out text, the needle, is put into other held-out text at some depth, and its first tokens, the key, are
repeated at the very end. The score is how much of the rest of the needle the model then predicts, token by token. A text
needle, not random tokens, works with any tokenizer and also for models too small to copy what they have never seen; what
they would have guessed without the needle is measured too, with another passage in its place.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvfold.convert.processes import spread
from kvfold.convert.source.stream import logit_scale, logits_of

KEY, VALUE = 8, 16
"""Tokens of a needle that are repeated, and that the model has to find, in windows that are long enough."""


@dataclass(frozen=True)
class NeedleGrid:
    """Depths as shares of the haystack, contexts of window, window/2, …, and needles for each of their pairs."""

    depths: tuple[float, ...]
    lengths: int
    trials: int


GRIDS = {
    "quick": NeedleGrid((0.0, 0.5, 1.0), 2, 8),
    "normal": NeedleGrid((0.0, 0.25, 0.5, 0.75, 1.0), 3, 16),
    "full": NeedleGrid(tuple(i / 10 for i in range(11)), 5, 64),
}


@torch.no_grad()
def find_needles(model: PreTrainedModel, windows: Tensor, grid: NeedleGrid) -> dict[str, Any] | None:
    """Hide needles in `windows` (rows, T) and ask for them.

    Returns:
        Tokens of key and value, trials, and `cells`: for each length and depth `recall`, the share of the value that is the
        model's most likely token, `blind`, the same without the needle in the context, and `gain_nats`, how much
        lower the NLL per token of the value is with the needle than without. None when the text is too short: fewer than
        three windows, or windows of fewer than 24 tokens.
    """
    length = windows.shape[1]
    key, value = min(KEY, length // 12), min(VALUE, length // 6)
    if len(windows) < 3 or length < 24:
        return None
    trials = min(grid.trials, len(windows))
    lengths = [length >> k for k in range(grid.lengths) if length >> k >= 3 * (key + value)]
    asked = [(n, depth) for n in sorted(lengths) for depth in (None, *grid.depths)]

    def ask(number: int, cell: tuple[int, float | None]) -> tuple[float, float]:
        rows = _with_needles(windows, trials, *cell, key, value)
        return _score(model, rows, value)

    found = dict(zip(asked, spread(asked, ask), strict=True))
    cells = []
    for n in sorted(lengths):
        blind, without = found[n, None]
        for depth in grid.depths:
            recall, nll = found[n, depth]
            cells.append({"length": n, "depth": depth, "recall": recall, "blind": blind, "gain_nats": without - nll})
    return {"key_tokens": key, "value_tokens": value, "trials": trials, "cells": cells}


def _with_needles(windows: Tensor, trials: int, length: int, depth: float | None, key: int, value: int) -> Tensor:
    """(trials, length): haystack, needle at `depth` of it, haystack, needle again; None puts another passage in its place."""
    size = key + value
    haystack = windows[:trials, : length - 2 * size]
    begin = (windows.shape[1] - size) // 2  # from the middle of another window, where no document is likely to begin
    needle = windows.roll(1, 0)[:trials, begin : begin + size]
    other = windows.roll(2, 0)[:trials, begin : begin + size]
    # the first token stays first: it may be the one that all text begins with
    at = max(1, round((0.5 if depth is None else depth) * haystack.shape[1]))
    return torch.cat([haystack[:, :at], other if depth is None else needle, haystack[:, at:], needle], 1)


def _score(model: PreTrainedModel, rows: Tensor, value: int, batch: int = 8) -> tuple[float, float]:
    """How many of each row's last `value` tokens are the most likely ones, and their mean NLL in nats."""
    right, nll = [], []
    for ids in rows.to(model.device).split(batch):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, -value - 1 : -1]
        logits = logits_of(model, logit_scale(model.config) * hidden).flatten(0, 1)
        targets = ids[:, -value:].flatten()
        right.append((logits.argmax(-1) == targets).double())
        nll.append(F.cross_entropy(logits, targets, reduction="none").double())
    return float(torch.cat(right).mean()), float(torch.cat(nll).mean())
