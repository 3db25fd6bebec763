"""Reading Hugging Face checkpoints tensor by tensor.

The safetensors file format is an 8-byte little-endian header length, a JSON header that gives each tensor's dtype, shape and
byte range, and the raw bytes. The library reads through a memory map and writes whole files from memory; kvfold
reads one tensor at a time into its own buffer and writes (writer.py) into files whose headers were laid out in advance, so
that peak memory is one layer and an interrupted conversion keeps what it had finished.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvfold.convert.families.translation import Cut
from kvfold.convert.families.views import View, view_of
from kvfold.convert.output.files import CHUNK
from kvfold.convert.source.configfile import raw_config, refuse_adapter
from kvfold.convert.source.jsonfile import checked, read_json
from kvfold.errors import UserError

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
BLOCK = 1 << 16
"""Numbers checked at a time: what a core's own cache holds."""
_SHARD = re.compile(r"[^/\\\x00]{1,240}\.safetensors")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, its name there, dtype, shape and byte range in the file.

    One that is made of another, which it is a `part` of by a function `cut`, has the shape and the bytes that come of it.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    part: "TensorEntry | None" = None
    cut: Cut | None = None


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
        start, size = 8 + length + begin, end - begin
        entries[name] = TensorEntry(path, name, DTYPES[tensor.dtype], tuple(tensor.shape), start, size)
    return entries


class CheckpointReader:
    """A local checkpoint folder: config and index first, tensors when asked for.

    A family under another name, or a language model inside of another one, is read as the family that it is.

    Attributes:
        folder: the checkpoint's folder.
        config: config.json as a dict.
        view: how it is read where its names are not those of a family.
        entries: every tensor's place, in the checkpoint's order.
        beside: those of a model of several parts that are not the language model's.

    Raises:
        UserError: no config, no safetensors weights, an index naming a tensor or shard that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = raw_config(folder)
        self.view = view_of(raw)
        self.config = raw if self.view is None else self.view.config
        self.entries = self._read_entries()
        self.beside: dict[str, TensorEntry] = {}
        if self.view is not None:
            self.entries, self.beside = _seen(self.view, self.entries)

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
            remedy = "convert them once with `AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DIR)` and fold DIR"
            if self.view is not None:  # that would want the code of whoever wrote them
                remedy = "the Space safetensors/convert on the Hub makes safetensors of them: fold its revision"
            raise UserError(f"{folder} holds pickled .bin weights only, which kvfold does not open; {remedy}")
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
        tensor = _read(entry) if entry.part is None or entry.cut is None else entry.cut(_read(entry.part)).contiguous()
        if check_finite:
            _refuse_nonfinite(tensor, name, entry.file)
        return tensor

    def entry(self, name: str) -> TensorEntry:
        entry = self.entries.get(name) or self.beside.get(name)
        if entry is None:
            raise UserError(f"{self.folder} has no tensor {name}: the checkpoint is incomplete or of another architecture")
        return entry

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of a tensor in pieces, checked for NaN and infinity on the way."""
        entry = self.entry(name)
        if entry.cut is not None:
            yield self.tensor(name).flatten().view(torch.uint8).numpy().data
            return
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


def _read(entry: TensorEntry) -> Tensor:
    tensor = torch.empty(entry.size // entry.dtype.itemsize, dtype=entry.dtype)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        _read_into(file, tensor.view(torch.uint8).numpy().data)
    return tensor.view(entry.shape)


def _seen(view: View, stored: dict[str, TensorEntry]) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    """A language model's tensors under the names of its family, and the others as they are."""
    found: dict[str, TensorEntry] = {}
    beside: dict[str, TensorEntry] = {}
    for name, entry in stored.items():
        made = view.made_of(name)
        if made is None:
            beside[name] = entry
        for new, cut in (made or {}).items():
            if new in found:
                raise UserError(f"{entry.file} holds {name}, which is {found[new].name} once more: download it again")
            if cut is None:
                found[new] = entry
                continue
            try:
                shape = tuple(cut(torch.empty(entry.shape, device="meta")).shape)
            except RuntimeError:
                raise UserError(f"{name} in {entry.file} has shape {entry.shape}, which config.json does not mean") from None
            size = entry.dtype.itemsize * torch.Size(shape).numel()
            found[new] = TensorEntry(entry.file, name, entry.dtype, shape, entry.start, size, entry, cut)
    return found, beside


def _refuse_nonfinite(tensor: Tensor, name: str, file: Path) -> None:
    if not is_finite(tensor):
        raise UserError(f"tensor {name} in {file} holds NaN or infinity: the checkpoint is damaged, get a sound copy")


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite: shifted past their sign, the bits of such are the largest there are."""
    # By NumPy: torch's threads, begun anew in each of several that copy, stand in each other's way.
    if not tensor.is_floating_point():
        return True
    unsigned = f"u{tensor.dtype.itemsize}"
    infinity = torch.tensor(torch.inf).to(tensor.dtype)[None].view(torch.uint8).numpy().view(unsigned)
    bits = tensor.detach().cpu().flatten().view(torch.uint8).numpy().view(unsigned)
    return all((bits[start : start + BLOCK] << 1).max() < (infinity << 1)[0] for start in range(0, len(bits), BLOCK))


def _read_into(file: IO[bytes], buffer: memoryview) -> None:
    """Fill `buffer`. Raises UserError when the file ends before it is full."""
    while buffer:
        got = file.readinto(buffer)  # type: ignore[attr-defined]
        if not got:
            raise UserError(f"{file.name} ended too early: download the checkpoint again")
        buffer = buffer[got:]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a checkpoint will hold, under another name than `name` where that is `stored`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()
