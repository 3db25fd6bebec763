"""`accelerate launch`: the same work shared out over processes, in a way that leaves the numbers as they are."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from kvfold.convert.pipeline import pick_device

Item = TypeVar("Item")
Result = TypeVar("Result")
PATIENCE = timedelta(hours=24)
"""How long processes wait for the main one, which alone measures speed and runs tasks."""


def state() -> PartialState:
    """The processes of this run; alone without `accelerate launch`."""
    # Unless it is told so, accelerate takes processes without a GPU for each its own run.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def own_device(name: str) -> torch.device:
    """As `pick_device`; among several processes `auto` is the one that accelerate gave to this one."""
    return state().device if name == "auto" and state().num_processes > 1 else pick_device(name)


def spread(items: Sequence[Item], work: Callable[[int, Item], Result]) -> list[Result]:
    """`work(number, item)` for every item, in order; each is done whole by one process, and all processes get the list."""
    processes, own = state().num_processes, state().process_index
    mine = [(number, work(number, item)) for number, item in enumerate(items) if number % processes == own]
    gathered: list[tuple[int, Result]] = gather_object(mine)
    return [result for _, result in sorted(gathered, key=lambda pair: pair[0])]


def on_main(work: Callable[[], Result]) -> Result:
    """What the main process makes of `work()`, on all of them."""
    made: list[Any] = [work() if state().is_main_process else None]
    return broadcast_object_list(made)[0]
