"""Files that are whole or not there, whatever interrupts their writing, and checksums of what was written."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import xxhash
from torch import Tensor

from kvfold.errors import UserError

CHUNK = 4 << 20
"""Bytes read or copied at a time."""


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: str | bytes | memoryview) -> None:
    """Write a file by way of another one: a kill or a power cut leaves the old file or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    sync(path.parent)


def refuse_full_disk(out: Path, need: int, about: str = "") -> None:
    """Raise UserError when the disk that `out` will lie on has fewer than `need` bytes free, which are exact or `about`."""
    free = shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.exists())).free
    if need > free:
        raise UserError(
            f"{out.parent} has {free:,} bytes free and {out.name} needs {about}{need:,}: free some, or write elsewhere"
        )


def checksum_of(file: IO[bytes], start: int, size: int) -> str:
    """XXH3 of `size` bytes of an open file from `start` on; of fewer where it ends before."""
    digest, left = xxhash.xxh3_64(), size
    file.seek(start)
    while left and (piece := file.read(min(CHUNK, left))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """XXH3 of a whole file."""
    with path.open("rb") as file:
        return checksum_of(file, 0, path.stat().st_size)


def checksum_of_rows(ids: Tensor) -> str:
    """XXH3 of an integer tensor on the CPU, its shape included."""
    digest = xxhash.xxh3_64(str(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().data)
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """XXH3 of every file under a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files_under(folder)}


def files_under(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def stamp(path: Path) -> str:
    """Size and time of a file: what tells without reading it that it is still the same."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"
