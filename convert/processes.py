"""The processes of `accelerate launch` or torchrun that do one piece of work together. A process alone sees nothing of this.

Each process holds every n-th calibration window and runs it through the layers by itself. What follows from all windows is
summed up over the processes first, so that each comes to the same numbers and decides the same. The main process alone writes.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from kvfold.errors import ConversionError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
MEETING, PATIENCE = timedelta(minutes=10), timedelta(hours=24)
"""How long processes wait for each other at the start, and later: the main one alone samples text, copies and verifies."""
STOPPED = "stopped"
"""Where the first process that stops leaves its number and its reason."""
_store: distributed.Store | None = None
_go_on = ""


class Lost(ConversionError):
    """Another process has stopped."""


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def index() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    return index() == 0


def here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


def join(device: str, go_on: str = "repeat with --resume to go on") -> str:
    """Meet the other processes, if this one was started with others. Where they use CUDA, each has a GPU of its machine for its
    current device.

    Args:
        device: as `--device` names it.
        go_on: what to do when a process has stopped.

    Returns:
        The same, but `cpu` where the launcher has said so.

    Raises:
        UserError: one GPU is named for several processes, there are more of them than GPUs, or they do not meet.
    """
    global _store, _go_on
    _go_on = go_on
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        device = "cpu"
    if size == 1 or distributed.is_initialized():
        return device
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        beside, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if ":" in device:
            raise UserError(f"--device {device} names one GPU, and there are {size} processes: give --device cuda")
        if beside > gpus:
            raise UserError(f"there are {beside} processes and {gpus} GPUs here: start one for each GPU")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        _store, rank, size = next(distributed.rendezvous("env://", timeout=MEETING))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        distributed.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"this is one of {size} processes (WORLD_SIZE), and it does not meet the others ({reason}): start them with "
            "accelerate launch or torchrun"
        ) from error
    return device


def part() -> None:
    """Take leave of each other."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def stopping_together() -> Iterator[None]:
    """What stops one process, it leaves for the others: they raise Lost with it where they next wait for each other."""
    try:
        yield
    except Lost:
        raise
    except BaseException as error:
        if _store is not None and count() > 1:
            reason = f"by a signal; {_go_on}" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
            with suppress(RuntimeError):  # it has gone with the process that held it
                _store.compare_set(STOPPED, "", json.dumps([index(), reason]))
        raise


@contextmanager
def _speaking() -> Iterator[None]:
    """Around all that processes say to each other, which fails when one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())[:100]
        reason = f"another process was killed or cannot be reached ({said}); what is finished is kept, {_go_on}"
        with suppress(RuntimeError, ValueError):
            if _store is not None and _store.check([STOPPED]):
                number, said = json.loads(_store.get(STOPPED))
                reason = f"process {number} stopped: {said}"
        raise Lost(reason) from error


def share(rows: Tensor) -> Tensor:
    """Those of all windows (rows, ...) that this process holds: every n-th."""
    return rows[index() :: count()]


def held(first: int) -> int:
    """How many of the first so many windows this process holds; they are the first of its own."""
    return len(range(index(), first, count()))


def of_all(rows: Tensor) -> Tensor:
    """The windows (rows, ...) of all processes, on each of them, in the order from which `share` took them. On the CPU."""
    shares = gathered(rows)
    places = torch.cat([numbers(len(each), process) for process, each in enumerate(shares)])
    return torch.cat(shares)[places.argsort()]


def numbers(held: int, process: int | None = None) -> Tensor:
    """The numbers among all of the first so many windows that a process holds, this one where none is named."""
    return torch.arange(held) * count() + (index() if process is None else process)


def own(picked: Tensor) -> Tensor:
    """Of windows by their number among all, those that this process holds, by their number among its own."""
    return picked[picked % count() == index()] // count()


def own_file(path: Path) -> Path:
    """A name that no other process takes."""
    return path if is_main() else path.with_stem(f"{path.stem}-{index()}")


def total(*tensors: Tensor) -> list[Tensor]:
    """The sums of tensors over all processes, the same bits on each. Their memory may be used for it."""
    if count() == 1:
        return list(tensors)
    sums = [tensor.contiguous() for tensor in tensors]
    with _speaking():
        for work in [distributed.all_reduce(each, async_op=True) for each in sums]:
            work.wait()
    return sums


def mean(value: Tensor | float, rows: int) -> float:
    """The mean over the windows of all processes of what is `value` over the `rows` windows of this one, which may be none."""
    if count() == 1:
        return float(value)
    (sums,) = total(torch.tensor([float(value) * rows if rows else 0.0, rows], dtype=torch.float64))
    return float(sums[0] / sums[1])


def same(tensor: Tensor) -> Tensor:
    """The main process's tensor, of this shape on all of them."""
    if count() == 1:
        return tensor
    tensor = tensor.contiguous()
    with _speaking():
        distributed.broadcast(tensor, 0)
    return tensor


def from_main(work: Callable[[], Result]) -> Result:
    """What the main process makes of `work()`, on all of them. Tensors in it must be on the CPU."""
    if count() == 1:
        return work()
    made: list[Any] = [work() if is_main() else None]
    with _speaking():
        distributed.broadcast_object_list(made, 0)
    result: Result = made[0]
    return result


def gathered(value: Result) -> list[Result]:
    """The values of all processes, in order. Tensors in them must be on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with _speaking():
        distributed.all_gather_object(values, value)
    return values


def from_one(value: Result | None) -> Result:
    """The value of the first process that has one, on all of them. Tensors in it must be on the CPU."""
    return next(found for found in gathered(value) if found is not None)


def spread(items: Sequence[Item], work: Callable[[int, Item], Result]) -> list[Result]:
    """`work(number, item)` for every item, in order; each is done whole by one process, and all processes get the list."""
    mine = [work(number, item) for number, item in enumerate(items) if number % count() == index()]
    shares = gathered(mine)
    return [shares[number % count()][number // count()] for number in range(len(items))]
