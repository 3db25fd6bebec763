"""Latents in pages: the designs of kvfold_attention.py over the cache of an engine that batches continuously.

Torch alone, and Triton where there is a CUDA device: `kernel.py` decodes there.

Shapes: n new tokens of all requests; B requests that attend at once, with t new tokens and S tokens to read each; N tokens in a
page, W numbers cached per token; H heads of width D, d the hidden size.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvfold.serving import latents, selfcheck
from kvfold.surgery.kvfold_attention import FoldedAttention, Rope

AT_ONCE = 65536
"""Tokens, padding included, that requests which attend at once read at most, unless a single one reads more."""


@dataclass(frozen=True)
class Together:
    """Requests of the same number of new tokens, which attend at once. What they read stands on the right, the newest last.

    Attributes:
        new: (B, t) which tokens of the step are theirs.
        pages, places: (B, S) where each token that they read lies.
        mask: (B, 1, t, S) what each new token may see, None where that is all before it.
    """

    new: Tensor
    pages: Tensor
    places: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Singles:
    """Requests of one new token each, as a kernel reads them.

    Attributes:
        new: (B,) which tokens of the step are theirs.
        table: (B, pages) int32, their pages.
        lengths: (B,) int32, tokens of each, `longest` at most.
    """

    new: Tensor
    table: Tensor
    lengths: Tensor
    longest: int


class Step:
    """What the engine computes at once: the new tokens of some requests, one behind the other.

    Args:
        starts: where each request's new tokens begin, and where the last one's end.
        lengths: tokens of each request, the new ones included.
        table: (requests, pages) the pages of each request in the order of its tokens.
        slots: (n,) page · N + place where each new token is cached.
    """

    def __init__(self, starts: list[int], lengths: list[int], table: Tensor, slots: Tensor) -> None:
        self.starts, self.lengths, self.table, self.slots = starts, lengths, table, slots
        self.groups: dict[tuple[int, int | None, bool], list[Together]] = {}

    def together(self, page: int, window: int | None, singles: bool = True) -> list[Together]:
        """All requests, as they attend at once: those with one new token in some groups, every other by itself.

        Those with one new token are left out where a kernel takes all `singles`.
        """
        key = page, window, singles
        if key not in self.groups:
            self.groups[key] = [self._group(requests, page, window) for requests in self._requests(window, singles)]
        return self.groups[key]

    @cached_property
    def singles(self) -> Singles | None:
        """The requests with one new token, None where there are none."""
        rows = self._single
        if not rows:
            return None
        device, lengths = self.table.device, [self.lengths[r] for r in rows]
        new, chosen = (torch.tensor(numbers, device=device) for numbers in ([self.starts[r] for r in rows], rows))
        table = self.table[chosen].to(torch.int32)
        return Singles(new, table, torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths))

    @cached_property
    def _single(self) -> list[int]:
        return [r for r in range(len(self.lengths)) if self._count(r) == 1]

    def _requests(self, window: int | None, singles: bool) -> list[list[int]]:
        several = [[r] for r in range(len(self.lengths)) if self._count(r) > 1]
        if not singles:
            return several
        found: list[list[int]] = [[]]
        for request in sorted(self._single, key=lambda r: self._read(r, window)):
            if (len(found[-1]) + 1) * self._read(request, window) > AT_ONCE and found[-1]:
                found.append([])
            found[-1].append(request)
        return several + found if self._single else several

    def _count(self, request: int) -> int:
        return self.starts[request + 1] - self.starts[request]

    def _read(self, request: int, window: int | None) -> int:
        seen = self.lengths[request]
        return seen if window is None else min(seen, window + self._count(request) - 1)

    def _group(self, requests: list[int], page: int, window: int | None) -> Together:
        device, new = self.table.device, self._count(requests[0])
        read = max(self._read(r, window) for r in requests)
        starts, lengths, rows = (
            torch.tensor(numbers, device=device)[:, None]
            for numbers in ([self.starts[r] for r in requests], [self.lengths[r] for r in requests], requests)
        )
        columns = torch.arange(read, device=device)
        positions = lengths - read + columns  # (B, S)
        distance = columns[read - new :, None] - columns  # (t, S)
        seen = (distance >= 0) & (distance < (window or read))
        mask = seen & (positions >= 0)[:, None, None]
        positions = positions.clamp(min=0)
        causal = new == read <= (window or read)
        return Together(
            starts + torch.arange(new, device=device),
            self.table[rows, positions // page].long(),
            positions % page,
            None if (causal and len(requests) == 1) or bool(mask.all()) else mask,
        )


class Reading:
    """What a design takes for a transformers cache: it gives what a group reads, which has been written before."""

    def __init__(self, pages: Tensor, group: Together) -> None:
        self.pages, self.group = pages, group

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(B, 1, t, W), new ones that lie in the pages already → (B, 1, S, W), and no values."""
        states = self.pages[self.group.pages, self.group.places][:, None]
        return states, states[..., :0]

    def get_seq_length(self, layer: int) -> int:
        """Tokens before the new ones, counted from the oldest that is read: RoPE knows distances only."""
        return self.group.places.shape[1] - self.group.new.shape[1]


@dataclass(frozen=True)
class Layer:
    """A design over pages.

    Attributes:
        window: how many tokens a token sees, itself included; None for all.
    """

    attention: FoldedAttention
    window: int | None = None

    @cached_property
    def shape(self) -> latents.Shape | None:
        """What a kernel sees of it, None where there is nothing for one."""
        return latents.shape_of(self.attention)

    def kernel(self, page: int, dtype: torch.dtype, device: torch.device) -> latents.Attend | None:
        """What decodes it in one pass over its pages, None where PyTorch's operations do."""
        return None if self.shape is None else selfcheck.kernel(self.shape, page, dtype, device)

    def attend(self, x: Tensor, rope: Rope, pages: Tensor, step: Step) -> Tensor:
        """Cache the new tokens of a step and let them attend: (n, d) → (n, H·D), before the output projection.

        All are cached before any attends, as a request may begin with a page that another one fills in the same step.

        Args:
            rope: tables (n, D) of the new tokens.
            pages: (pages, N, W) the layer's cache, which is written.
        """
        attention, size = self.attention, pages.shape[1]
        states = attention.states(x[None], (rope[0][None], rope[1][None]))[0, 0]
        pages[step.slots // size, step.slots % size] = states.to(pages.dtype)
        out, kernel = x.new_zeros(len(x), attention.o_proj.in_features), self.kernel(size, pages.dtype, pages.device)
        for group in step.together(size, self.window, singles=kernel is None):
            tables: Any = tuple(table[group.new] for table in rope)
            mixed = attention.read(x[group.new], states[group.new][:, None], tables, group.mask, Reading(pages, group))
            out[group.new] = mixed.transpose(1, 2).flatten(2).to(out)
        if kernel is not None and self.shape is not None and (single := step.singles) is not None:
            angles, pairs = latents.tables(attention, single.longest, pages)
            cached = latents.Cached(pages, single.table, single.lengths, single.longest, self.window, angles, pairs)
            new = single.new
            out[new] = latents.decode(attention, self.shape, x[new], (rope[0][new], rope[1][new]), cached, kernel).to(out)
        return out
