"""Reading Hugging Face checkpoints tensor by tensor.

The safetensors file format is an 8-byte little-endian header length, a JSON header that gives each tensor's dtype, shape and
byte range, and the raw bytes. The library reads through a memory map and writes whole files from memory; kvfold
reads one tensor at a time into its own buffer and writes (writer.py) into files whose headers were laid out in advance, so
that peak memory is one layer and an interrupted conversion keeps what it had finished.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from kvfold.convert.files import CHUNK
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


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, dtype, shape and byte range in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file. Raises UserError when it is missing, truncated or not such a file."""
    remedy = "download the checkpoint again"
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > total - 8:
                raise UserError(f"{path} is truncated inside its header: {remedy}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}, or remove it from {INDEX}") from None
    except (struct.error, ValueError):
        raise UserError(f"{path} is not a safetensors file or its header is damaged: {remedy}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: {remedy}")
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
            raise UserError(f"{path} has a damaged header at tensor {name}: {remedy}")
        if info["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: tensor {name} has dtype {info['dtype']}, which kvfold does not read; "
                "start from the unquantised checkpoint"
            )
        begin, end = info["data_offsets"]
        if 8 + length + end > total:
            raise UserError(f"{path} is truncated: tensor {name} ends {8 + length + end - total} bytes past it; {remedy}")
        if end - begin != DTYPES[info["dtype"]].itemsize * torch.Size(info["shape"]).numel():
            raise UserError(f"{path} has a damaged header at tensor {name}: {remedy}")
        entries[name] = TensorEntry(path, DTYPES[info["dtype"]], tuple(info["shape"]), 8 + length + begin, end - begin)
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
        index = folder / INDEX
        if index.exists():
            weight_map = read_json(index).get("weight_map", {})
            headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
            for name, shard in weight_map.items():
                if name not in headers[shard]:
                    raise UserError(f"{index} names tensor {name}, but {shard} does not hold it; download both again")
            self.entries = {name: headers[shard][name] for name, shard in weight_map.items()}
        elif (folder / SINGLE).exists():
            self.entries = read_header(folder / SINGLE)
        elif any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise UserError(
                f"{folder} holds pickled .bin weights only, which kvfold does not open; convert them once with "
                "`AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DIR)` and fold DIR"
            )
        else:
            raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}: give a folder with safetensors weights")

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
    """config.json of a local checkpoint. Raises UserError when there is none or it is not JSON."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint or a Hub id")
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file holds none."""
    try:
        loaded = json.loads(path.read_text())
        if not isinstance(loaded, dict):
            raise ValueError("no object in braces")
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again") from None
    return loaded


def _refuse_nonfinite(tensor: Tensor, name: str, file: Path) -> None:
    if not is_finite(tensor):
        raise UserError(f"tensor {name} in {file} holds NaN or infinity: the checkpoint is damaged, get a sound copy")


def is_finite(tensor: Tensor) -> bool:
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
