"""A piece of work in a process of its own, weighed."""

import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from kvfold.allocator import hold_memory


def apart(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`work(*args)` in a process of its own, with its seconds and peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        return pool.submit(_weighed, work, *args).result()


def _end_with_parent() -> None:
    """Else a benchmark that was killed and repeated would meet its own work still going on."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _weighed(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    hold_memory()  # as the commands do
    started, made = time.time(), work(*args)
    # not getrusage, which counts the process that this one was begun from
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    memory = int(peak[1]) * 1024 if peak else None
    return {**made, "seconds": round(time.time() - started, 1), "peak_memory_bytes": memory}
