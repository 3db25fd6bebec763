"""Writing a checkpoint so that an interruption loses little and leaves nothing that looks whole."""

import json
import os
import shutil
import struct
from collections.abc import Container, Iterable
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import IO, Any

from torch import Tensor, empty, frombuffer, uint8

from kvfold.convert.output.files import checksum, checksum_of, refuse_full_disk, sync, write_whole
from kvfold.convert.output.journal import Journal, Unit
from kvfold.convert.output.partial import JOURNAL, Partial, remove
from kvfold.convert.source.checkpoint import DTYPE_NAMES, INDEX, SINGLE, CheckpointReader, TensorSpec, is_finite
from kvfold.errors import ConversionError

RESULT = "result"


def assign_shards(specs: Iterable[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Fill shards in order; a tensor larger than `max_shard_size` bytes gets a shard of its own."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.size
    return shards


class CheckpointWriter:
    """Writes the tensors of a checkpoint into a `Partial`, in any order, and gives it its name when all is there.

    The layout of every file follows from `specs` alone, so a resumed conversion writes the same bytes as one that was
    never interrupted. What is finished is journalled, with the checksums of its tensors as they lie on the disk; a resume
    believes what still has them.

    Attributes:
        finished: unit of work → its record, for what need not be done again.

    Raises:
        UserError: the partial folder was begun with another job, its journal is damaged, or the disk is too full.
    """

    def __init__(self, partial: Partial, specs: list[TensorSpec], max_shard_size: int, job: dict[str, Any]) -> None:
        self._partial, self.folder = partial, partial.folder
        self._place: dict[str, tuple[Path, int, TensorSpec]] = {}
        self._index: dict[str, str] = {}
        self._open: dict[Path, IO[bytes]] = {}
        self._opening = Lock()  # tensors may be copied by several threads
        self._unfinished: list[str] = []
        self._beside: dict[str, str] = {}
        self._dropped: list[str] = []
        self._removable: list[str] = []
        shards = assign_shards(specs, max_shard_size)
        headers: dict[Path, tuple[bytes, int]] = {}
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            headers[self.folder / name] = self._lay_out(name, shard)
        self.total_size = sum(s.size for s in specs)
        self._files = list(headers)

        self._journal = Journal(self.folder / JOURNAL)
        units: list[Unit] = []
        if partial.resumed:
            units = self._journal.read(job)
            self._recall()
        else:
            refuse_full_disk(self._partial.out, self.total_size)
            self._journal.begin(job)
        for path, (header, end) in headers.items():
            _lay_down(path, header, end)
        self._journal.keep(self._intact(units))
        self.finished = {unit.unit: unit.record for unit in self._journal.units}
        self._beside = dict(self._journal.units[-1].files) if self._journal.units else {}

    def _lay_out(self, name: str, shard: list[TensorSpec]) -> tuple[bytes, int]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in shard:
            header[spec.stored or spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.size],
            }
            offset += spec.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
        start = 8 + len(text)
        for spec in shard:
            stored = spec.stored or spec.name
            self._place[spec.name] = (self.folder / name, start + header[stored]["data_offsets"][0], spec)
            self._index[stored] = name
        return struct.pack("<Q", len(text)) + text, start + offset

    def _recall(self) -> None:
        """Undo what a commit had begun."""
        for path in self._files:
            if (self.folder / RESULT / path.name).exists():
                os.replace(self.folder / RESULT / path.name, path)
        shutil.rmtree(self.folder / RESULT, ignore_errors=True)

    def _intact(self, units: list[Unit]) -> list[Unit]:
        """The first of these units, as many as still are on the disk as they were journalled.

        A later unit may follow from an earlier one, and goes on from the files that the last one kept beside it.
        """
        sound: list[Unit] = []
        for unit in units:
            if any(name not in self._place or self._checksum(name) != wanted for name, wanted in unit.tensors.items()):
                break
            sound.append(unit)
        while sound and not all(_is_intact(self.folder / name, wanted) for name, wanted in sound[-1].files.items()):
            sound.pop()
        return sound

    def _checksum(self, name: str) -> str:
        path, offset, spec = self._place[name]
        with path.open("rb", buffering=0) as file:
            return checksum_of(file, offset, spec.size)

    def write(self, name: str, tensor: Tensor, journalled: bool = True) -> None:
        """Write one tensor, cast to its planned dtype; with `journalled` it belongs to the unit that is finished next.

        Raises ConversionError on a wrong shape, on NaN or infinity, and on a value lost to the cast.
        """
        spec = self._place[name][2]
        if tuple(tensor.shape) != spec.shape:
            raise ConversionError(f"{name} has shape {tuple(tensor.shape)}, planned {spec.shape}: please report this")
        cast = tensor.detach().to("cpu", spec.dtype).contiguous()
        if not is_finite(cast):
            if not is_finite(tensor.detach()):
                raise ConversionError(f"{name} came out as NaN or infinity: check the source's weights in that layer")
            raise ConversionError(f"{name} does not fit {spec.dtype}: it would hold NaN or infinity; choose a wider --dtype")
        self._put(name, [cast.flatten().view(uint8).numpy().data], journalled)

    def copy(
        self, name: str, reader: CheckpointReader, source: str | None = None, factor: float = 1.0, journalled: bool = True
    ) -> None:
        """Copy the tensor `source` (or `name`) of the source: byte for byte when it stays as it is, cast otherwise."""
        source = source or name
        if self.stays(name, reader, source, factor):
            self._put(name, reader.chunks(source), journalled)
        else:
            tensor = reader.tensor(source)
            self.write(name, tensor if factor == 1.0 else tensor.float() * factor, journalled)

    def stays(self, name: str, reader: CheckpointReader, source: str, factor: float = 1.0) -> bool:
        """Whether the tensor `source` of the source, times `factor`, has the bytes that `name` will have."""
        entry = reader.entry(source)
        return entry.dtype == self._place[name][2].dtype and entry.cut is None and factor == 1.0

    @property
    def names(self) -> Container[str]:
        """Of all tensors that the checkpoint will have."""
        return self._place

    def read(self, name: str) -> Tensor:
        """Read back a tensor that has been written."""
        path, offset, spec = self._place[name]
        if not spec.size:
            return empty(spec.shape, dtype=spec.dtype)
        with path.open("rb") as file:
            file.seek(offset)
            return frombuffer(bytearray(file.read(spec.size)), dtype=spec.dtype).view(spec.shape)

    def _put(self, name: str, pieces: Iterable[memoryview], journalled: bool) -> None:
        path, start, spec = self._place[name]
        with self._opening:
            if path not in self._open:
                self._open[path] = path.open("r+b", buffering=0)
        file, at = self._open[path].fileno(), start
        for piece in pieces:
            rest = piece
            while rest:
                written = os.pwrite(file, rest, at)
                rest, at = rest[written:], at + written
        if hasattr(os, "posix_fadvise"):  # Linux begins to write then, and has little left when it must have written
            os.posix_fadvise(file, start, spec.size, os.POSIX_FADV_DONTNEED)
        if journalled:
            self._unfinished.append(name)

    def keep(self, name: str, data: bytes | memoryview) -> None:
        """Write a file that whoever resumes behind the unit that is finished next, or a later one, will need."""
        path = self.folder / name
        write_whole(path, data)
        self._beside[name] = checksum(path)

    def drop(self, name: str) -> None:
        """Give up a file that nobody will need behind the next unit.

        It is removed one unit later: should what that one keeps be damaged, the unit before it is still good.
        """
        self._beside.pop(name, None)
        self._dropped.append(name)

    def finish(self, unit: str, record: dict[str, Any]) -> None:
        """Journal a unit of work: what was written since the one before. `record` comes back in `finished` after a resume."""
        for path in {self._place[name][0] for name in self._unfinished}:
            os.fsync(self._open[path].fileno())
        tensors = {name: self._checksum(name) for name in self._unfinished}
        self._journal.append(Unit(unit=unit, record=record, tensors=tensors, files=dict(self._beside)))
        self.finished[unit] = record
        for name in self._removable:
            (self.folder / name).unlink(missing_ok=True)
        self._unfinished, self._removable, self._dropped = [], self._dropped, []

    def commit(self, texts: dict[str, str], copies: Iterable[Path]) -> None:
        """Write the index and `texts` (name → content), copy the files `copies`, and give the folder its name."""
        self._close()
        result = self.folder / RESULT
        result.mkdir()
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": self._index}
            (result / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for file in copies:
            shutil.copyfile(file, result / file.name)
        for name, text in texts.items():
            (result / name).parent.mkdir(exist_ok=True)
            (result / name).write_text(text, encoding="utf-8")
        for path in self._files:
            sync(path)
            os.replace(path, result / path.name)
        self._partial.give_name(result)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


class Bystander(CheckpointWriter):
    """The writer of a process that writes nothing, and keeps the same account of what is `finished` as the main one's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.finished = folder, {}
        self._open = {}

    def write(self, name: str, tensor: Tensor, journalled: bool = True) -> None:
        pass

    def copy(
        self, name: str, reader: CheckpointReader, source: str | None = None, factor: float = 1.0, journalled: bool = True
    ) -> None:
        pass

    def keep(self, name: str, data: bytes | memoryview) -> None:
        pass

    def drop(self, name: str) -> None:
        pass

    def finish(self, unit: str, record: dict[str, Any]) -> None:
        self.finished[unit] = record


def _lay_down(path: Path, header: bytes, end: int) -> None:
    """Make a file of the right size with its header; what it holds behind that stays."""
    if path.is_symlink() or not path.is_file():
        remove(path)
        path.touch()
    with path.open("r+b") as file:
        file.write(header)
        file.truncate(end)


def _is_intact(path: Path, wanted: str) -> bool:
    return path.is_file() and checksum(path) == wanted
