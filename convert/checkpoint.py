"""Reading and writing Hugging Face checkpoints tensor by tensor.

The safetensors file format is an 8-byte little-endian header length, a JSON header that gives each tensor's dtype, shape and
byte range, and the raw bytes. The library reads through a memory map and writes whole files from memory; kvfold
reads one tensor at a time into its own buffer and writes into files whose headers were laid out in advance, so that peak
memory is one layer and an interrupted conversion keeps what it had finished.
"""

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvfold.convert.jsonfile import checked, read_json
from kvfold.errors import ConversionError, UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"[^/\\\x00]{1,240}\.safetensors")
CHUNK = 4 << 20
"""Bytes copied at a time."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, dtype, shape and byte range in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class _Tensor(BaseModel):
    """A tensor in a file's header, which the format's library has checked."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(BaseModel):
    """`model.safetensors.index.json`."""

    weight_map: dict[str, str] = Field(min_length=1)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises UserError when it is missing, no plain file, or what the format's own library refuses: truncated, offsets that
    overlap, leave holes or point outside, sizes against shapes.
    """
    remedy = "download the checkpoint again"
    if not path.exists():
        raise UserError(f"{path} is missing: {remedy}, or remove it from {INDEX}")
    if not path.is_file():
        raise UserError(f"{path} is no file: {remedy}")
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
    except (SafetensorError, struct.error, ValueError, RecursionError, OverflowError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file, or damaged ({' '.join(str(error).split())}): {remedy}") from None
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        tensor = checked(_Tensor, info, f"{path}, tensor {name!r:.80}", remedy)
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} has dtype {tensor.dtype}, which kvfold does not read; "
                "start from the unquantised checkpoint"
            )
        begin, end = tensor.data_offsets
        entries[name] = TensorEntry(path, DTYPES[tensor.dtype], tuple(tensor.shape), 8 + length + begin, end - begin)
    return entries


class CheckpointReader:
    """A local checkpoint folder: config and index first, tensors when asked for.

    Attributes:
        folder: the checkpoint's folder.
        config: config.json as a dict.
        entries: every tensor's place, in the checkpoint's order.

    Raises:
        UserError: no config, no safetensors weights, an index naming a tensor or shard that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.entries = self._read_entries()

    def _read_entries(self) -> dict[str, TensorEntry]:
        """As transformers chooses: one file before an index, and safetensors alone."""
        folder, index = self.folder, self.folder / INDEX
        if (folder / SINGLE).exists():
            return read_header(folder / SINGLE)
        if index.exists():
            weight_map = checked(_Index, read_json(index), str(index), "download it again").weight_map
            shards = sorted(set(weight_map.values()))
            for shard in shards:  # files beside the index and nowhere else
                if not _SHARD.fullmatch(shard):
                    raise UserError(f"{index} names {shard!r:.80}, which is no file of weights beside it: download it again")
            headers = {shard: read_header(folder / shard) for shard in shards}
            for name, shard in weight_map.items():
                if name not in headers[shard]:
                    raise UserError(f"{index} names tensor {name}, but {shard} does not hold it; download both again")
            return {name: headers[shard][name] for name, shard in weight_map.items()}
        refuse_adapter(folder)
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise UserError(
                f"{folder} holds pickled .bin weights only, which kvfold does not open; convert them once with "
                "`AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DIR)` and fold DIR"
            )
        raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}: give a folder with safetensors weights")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the checkpoint's numbers have, whatever its config says."""
        counts: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            if entry.dtype.is_floating_point:
                counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.size // entry.dtype.itemsize
        return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)

    def tensor(self, name: str, check_finite: bool = True, meta: bool = False) -> Tensor:
        """Read one tensor, with `meta` its shape without numbers.

        Raises:
            UserError: the checkpoint lacks it, or it holds NaN or infinity.
        """
        entry = self.entry(name)
        if meta:
            return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        tensor = torch.empty(entry.size // entry.dtype.itemsize, dtype=entry.dtype)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            _read_into(file, tensor.view(torch.uint8).numpy().data)
        if check_finite:
            _refuse_nonfinite(tensor, name, entry.file)
        return tensor.view(entry.shape)

    def entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise UserError(f"{self.folder} has no tensor {name}: the checkpoint is incomplete or of another architecture")
        return self.entries[name]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of a tensor in pieces, checked for NaN and infinity on the way."""
        entry = self.entry(name)
        buffer = torch.empty(min(CHUNK, entry.size) // entry.dtype.itemsize, dtype=entry.dtype)
        raw = buffer.view(torch.uint8).numpy().data
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.size
            while left:
                piece = raw[: min(left, len(raw))]
                _read_into(file, piece)
                _refuse_nonfinite(buffer[: len(piece) // entry.dtype.itemsize], name, entry.file)
                yield piece
                left -= len(piece)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a local checkpoint, with what other files say of a quantisation.

    Raises UserError when there is none, it is not JSON, or the folder is an adapter's.
    """
    if not (folder / "config.json").exists():
        refuse_adapter(folder)
        raise UserError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint or a Hub id")
    for path in folder.iterdir():  # whoever opens one waits for ever, and transformers opens many
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is a pipe or a device, no file: remove it")
    config = read_json(folder / "config.json")
    if (folder / "hf_quant_config.json").exists():  # where modelopt says it
        config.setdefault("quantization_config", {"quant_method": "modelopt"})
    return config


def refuse_adapter(folder: Path) -> None:
    """Raise UserError when the folder is a PEFT adapter's, which has no weights of its own."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} is an adapter, not a checkpoint: merge it first "
            "(AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW); where kvfold folded the "
            "base, copy its kvfold.json too)"
        )


def _refuse_nonfinite(tensor: Tensor, name: str, file: Path) -> None:
    if not _is_finite(tensor):
        raise UserError(f"tensor {name} in {file} holds NaN or infinity: the checkpoint is damaged, get a sound copy")


def _is_finite(tensor: Tensor) -> bool:
    # NaN and infinity both show in the extremes, which cost one pass at memory speed.
    return not tensor.is_floating_point() or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _read_into(file: IO[bytes], buffer: memoryview) -> None:
    """Fill `buffer`. Raises UserError when the file ends before it is full."""
    while buffer:
        got = file.readinto(buffer)  # type: ignore[attr-defined]
        if not got:
            raise UserError(f"{file.name} ended too early: download the checkpoint again")
        buffer = buffer[got:]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a checkpoint will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


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
    """Writes `OUT.partial/`, tensor by tensor in any order, and renames it to `OUT` when all is there.

    The layout of every file follows from `specs` alone, so a resumed conversion writes the same bytes as one that was
    never interrupted. What is finished is journalled: `journal.jsonl` holds a fingerprint of the job in its first line and one
    line for every finished unit of work. Leaving the `with` block by an exception keeps the partial folder and never
    makes an `OUT`.

    Raises:
        UserError: `OUT` or an interrupted `OUT.partial` exists and neither `overwrite` nor `resume` is asked for;
            `OUT.partial` was begun with other settings; the disk is too full.
    """

    JOURNAL = "journal.jsonl"

    def __init__(
        self,
        out: Path,
        specs: list[TensorSpec],
        max_shard_size: int,
        fingerprint: dict[str, Any],
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out, self.partial, self.overwrite = out, partial_folder(out), overwrite
        refuse_existing(out, overwrite)
        self._place: dict[str, tuple[Path, int, TensorSpec]] = {}
        self._index: dict[str, str] = {}
        self._open: dict[Path, IO[bytes]] = {}
        shards = assign_shards(specs, max_shard_size)
        headers: list[tuple[Path, bytes, int]] = []
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            headers.append((self.partial / name, *self._lay_out(name, shard)))
        self.total_size = sum(s.size for s in specs)
        self.sharded = len(shards) > 1

        self.finished: dict[str, dict[str, Any]] = {}
        journal = self.partial / self.JOURNAL
        self._begun_here = not (resume and journal.exists())
        if not self._begun_here:
            self.finished = _read_journal(journal, fingerprint)
        else:
            if journal.exists() and not overwrite:
                raise UserError(
                    f"{self.partial} holds an interrupted conversion: go on with --resume, or start anew with --overwrite"
                )
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
            need, free = self.total_size, shutil.disk_usage(self.partial).free
            if need > free:
                self.partial.rmdir()
                raise UserError(
                    f"{out.parent} has {free:,} bytes free and {out.name} needs {need:,}: free some, or write elsewhere"
                )
            for path, header, end in headers:
                with path.open("wb") as file:
                    file.write(header)
                    file.truncate(end)
            with journal.open("w") as file:
                file.write(json.dumps({"job": fingerprint}) + "\n")

    def _lay_out(self, name: str, shard: list[TensorSpec]) -> tuple[bytes, int]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in shard:
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.size],
            }
            offset += spec.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
        start = 8 + len(text)
        for spec in shard:
            self._place[spec.name] = (self.partial / name, start + header[spec.name]["data_offsets"][0], spec)
            self._index[spec.name] = name
        return struct.pack("<Q", len(text)) + text, start + offset

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, cast to its planned dtype. Raises ConversionError on a wrong shape or a value lost to the cast."""
        path, offset, spec = self._place[name]
        if tuple(tensor.shape) != spec.shape:
            raise ConversionError(f"{name} has shape {tuple(tensor.shape)}, planned {spec.shape}: please report this")
        cast = tensor.detach().to("cpu", spec.dtype).contiguous()
        if not _is_finite(cast):
            raise ConversionError(f"{name} does not fit {spec.dtype}: it would hold NaN or infinity; choose a wider --dtype")
        self._put(path, offset, [cast.flatten().view(torch.uint8).numpy().data])

    def copy(self, name: str, reader: CheckpointReader, source: str | None = None, factor: float = 1.0) -> None:
        """Copy the tensor `source` (or `name`) of the source: byte for byte when its dtype and scale stay, cast otherwise."""
        path, offset, spec = self._place[name]
        source = source or name
        if reader.entry(source).dtype == spec.dtype and factor == 1.0:
            self._put(path, offset, reader.chunks(source))
        else:
            tensor = reader.tensor(source)
            self.write(name, tensor if factor == 1.0 else tensor.float() * factor)

    def read(self, name: str) -> Tensor:
        """Read back a tensor that has been written."""
        path, offset, spec = self._place[name]
        with path.open("rb") as file:
            file.seek(offset)
            return torch.frombuffer(bytearray(file.read(spec.size)), dtype=spec.dtype).view(spec.shape)

    def _put(self, path: Path, offset: int, pieces: Iterable[memoryview]) -> None:
        if path not in self._open:
            self._open[path] = path.open("r+b", buffering=0)
        file = self._open[path]
        file.seek(offset)
        for piece in pieces:
            rest = piece
            while rest:
                rest = rest[file.write(rest) :]

    def finish(self, unit: str, record: dict[str, Any]) -> None:
        """Journal a unit of work whose tensors are all written; `record` comes back in `finished` after a resume."""
        self.finished[unit] = record
        with (self.partial / self.JOURNAL).open("a") as file:
            file.write(json.dumps({"unit": unit, "record": record}) + "\n")

    def commit(self, texts: dict[str, str], copies: Iterable[Path]) -> None:
        """Write the index and `texts` (name → content), copy the files `copies`, and give the folder its name."""
        self._close()
        if self.sharded:
            index = {"metadata": {"total_size": self.total_size}, "weight_map": self._index}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for file in copies:
            shutil.copyfile(file, self.partial / file.name)
        for name, text in texts.items():
            (self.partial / name).parent.mkdir(exist_ok=True)
            (self.partial / name).write_text(text, encoding="utf-8")
        for leftover in (self.JOURNAL, "waiting-*"):
            for path in self.partial.glob(leftover):
                path.unlink()
        give_name(self.partial, self.out, self.overwrite)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if isinstance(error, UserError) and self._begun_here:
            shutil.rmtree(self.partial)  # a request that cannot be carried out leaves nothing

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


def partial_folder(out: Path) -> Path:
    if not out.name or out.name == "..":
        raise UserError(f"{out} names no folder to write: choose another name")
    return out.with_name(out.name + ".partial")


def give_name(folder: Path, out: Path, overwrite: bool) -> None:
    """Rename `folder` to `out`. What `out` was goes only once the new one stands. Raises UserError as `refuse_existing`."""
    refuse_existing(out, overwrite)
    if not out.exists():
        os.rename(folder, out)
        return
    retired = Path(tempfile.mkdtemp(prefix=f"{out.name}.replaced-", dir=out.parent))
    os.rename(out, retired / out.name)
    try:
        os.rename(folder, out)
    except OSError:
        os.rename(retired / out.name, out)
        raise
    finally:
        shutil.rmtree(retired)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise UserError when `out` exists and may not be replaced."""
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: choose another name, or pass --overwrite to replace it")
    if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
        raise UserError(f"{out} is not a checkpoint folder: kvfold will not replace it; choose another name")


def _read_journal(journal: Path, fingerprint: dict[str, Any]) -> dict[str, dict[str, Any]]:
    lines = []
    for line in journal.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the line during which the process was killed
            break
    job = lines[0]["job"] if lines else {}
    if job != (wanted := json.loads(json.dumps(fingerprint))):
        differ = sorted(k for k in wanted.keys() | job.keys() if wanted.get(k) != job.get(k))
        raise UserError(
            f"{journal.parent} was begun with other settings ({', '.join(differ)}): repeat them exactly, "
            "or start anew with --overwrite in place of --resume"
        )
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))  # without the torn line, for what comes next
    return {line["unit"]: line["record"] for line in lines[1:]}
