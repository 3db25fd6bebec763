"""Healing's passes of layers through torch.compile, where that pays: in long runs on a CPU that has a C++ compiler."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.convert.source.stream import Block

PAYS = 1e14
"""Operations for each kind of layer from which on it pays: to compile one takes a minute, and saves a quarter of its passes."""


def compiled_where_it_pays(blocks: Sequence[Block], tokens: int) -> Callable[[], None]:
    """What has the blocks' passes with gradients compiled, where so many tokens go through each of them, or through as many
    others of their kinds; else nothing.

    That is decided by counting, not by time: a run that was interrupted goes on to the same bytes.
    """
    kinds = {tuple(p.shape for p in block.layer.parameters()) for block in blocks}
    operations = 6 * tokens * sum(p.numel() for block in blocks for p in block.layer.parameters())
    pays = blocks[0].device.type == "cpu" and operations >= PAYS * len(kinds)
    for block in blocks:  # those of a window before: compiled passes call no hooks
        block.trained = None

    def compile_passes() -> None:
        for block in blocks if pays else ():
            block.trained = _passes()

    return compile_passes


@cache
def _passes() -> "Passes":
    return Passes()


class Passes:
    """Passes of layers (B, T, d) → (B, T, d). Those of a kind are compiled once; where that fails, all run as they are."""

    def __init__(self) -> None:
        # In this process: workers would each take the memory of a torch of their own.
        self.compiled = torch.compile(_passed, fullgraph=True, dynamic=False, options={"compile_threads": 1})
        self.failed = False

    def __call__(self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if not self.failed:
            try:
                return self.compiled(layer, hidden, arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # no compiler, or a layer whose routers choose; an error of the pass itself comes again below
                self.failed = True
        return _passed(layer, hidden, arguments)


def _passed(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    after: Tensor = layer(hidden, **arguments)
    return after
