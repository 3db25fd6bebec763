"""kvfold.json: what is recorded of a conversion beside its weights, and its reading back."""

import re
import resource
import sys
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvfold.convert.publishing.escape import each, visible
from kvfold.convert.source.jsonfile import checked, read_json
from kvfold.errors import UserError

RECORD = "kvfold.json"


class _Kept(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Target(_Kept):
    to: Literal["gqa", "mqa", "mla", "mfa", "mfa-kr", "source"]
    method: str
    layout: str = "source"
    kv_rank: int = 0
    rope_dim: int = 0
    widths: list[list[int]] | None = None
    folded_layers: list[int] | None = None


class Settings(_Kept):
    """Those that are read again by themselves."""

    calibrate: str | None = None
    heal_steps: int = 0
    heal_batch_tokens: int = 0


class Uptraining(_Kept):
    recipe: dict[str, Any] = {}
    tokens: int | None = None
    distinct_tokens: int | None = None
    steps: int | None = None
    parameters_trained: int | None = None


class Layer(_Kept):
    inconstancy: float | None = Field(None, ge=0, allow_inf_nan=False)


class Record(_Kept):
    version: str
    source: str = Field(min_length=1)
    source_config: dict[str, Any] | None = None
    revision: str | None = None
    settings: Settings
    target: Target
    kv_budget: float
    calibration_tokens: int = Field(ge=0)
    seconds: float
    layers: list[Layer] = []
    uptraining: list[Uptraining] = []


def peak_memory() -> int:
    """Bytes that this process has had in memory at once, files that it maps included.

    Not getrusage's, which on Linux begins with what the process was started from had.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_record(folder: Path, missing: str, damaged: str) -> dict[str, Any]:
    """kvfold.json of a folded checkpoint, as it stands there.

    Raises UserError when it is not there or a field that kvfold reads is wrong, with what to do in either case.
    """
    file = folder / RECORD
    if not file.exists():
        raise UserError(f"{folder} has no {RECORD}: {missing}")
    data = read_json(file, damaged)
    checked(Record, each(data, visible), str(file), damaged)  # names of files may hold what is no text
    if "\0" in data["source"]:
        raise UserError(f"{file} is damaged (source: a path has no NUL): {damaged}")
    return data


def said_of_biases(layers: list[dict[str, Any]]) -> str:
    """How nearly constant the inputs are off which the biases of layers are read, in a sentence; empty where none are."""
    off = [layer["inconstancy"] for layer in layers if layer.get("inconstancy") is not None]
    if not off:
        return ""
    return (
        "Biases of queries, keys and values are read off the input, which varies in its most constant direction by "
        f"{median(off):.1%} in the median layer and by {max(off):.1%} in the worst."
    )
