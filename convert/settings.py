"""What a user can set for a conversion, and how what they wrote is read."""

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvfold.errors import UserError

TARGETS = ("gqa", "mqa", "mla", "mfa", "mfa-kr")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "f32": "float32", "half": "float16"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ConvertSettings(BaseModel):
    """Everything that decides what a conversion writes. Recorded in kvfold.json, and readable from there."""

    model_config = ConfigDict(extra="forbid")

    to: str
    kv_heads: int | None = None
    kv_rank: int | None = None
    rope_dim: int | None = None
    width: int | None = None
    q_rank: int | None = Field(None, ge=1)
    keys: Literal["absorbed", "rebuilt"] = "absorbed"
    layer_budgets: Literal["uniform", "measured"] = "uniform"
    layout: Literal["auto", "deepseek_v3", "step3_text", "kvfold"] = "auto"
    pad_for: Literal["vllm", "vllm-cpu", "none"] | None = None
    kv_budget: Annotated[str | None, BeforeValidator(lambda v: str(v) if isinstance(v, float) else v)] = None
    method: str | None = None
    grouping: Literal["neighbours", "similar"] | None = None
    calibrate: str | None = None
    calibration_tokens: int = Field(131072, gt=0)
    window: int = Field(512, ge=2)
    token_weights: Literal["uniform", "nll"] = "uniform"
    heal_steps: int = Field(300, ge=0)
    heal_window: Annotated[int, Field(ge=1)] | Literal["auto", "all"] = "auto"
    heal_batch_tokens: int = Field(4096, ge=1)
    heal_lr: float | None = Field(None, gt=0, le=1e6)
    heal_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    dtype: str | None = None
    device: str = "auto"
    max_shard_size: str = "5GB"
    seed: int = Field(0, ge=0, lt=2**32)
    revision: str | None = None


Settings = TypeVar("Settings", bound=BaseModel)


def parse_settings(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Check settings. Raises UserError naming all that is wrong at once."""
    try:
        return kind(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                problems.append(unknown("setting", name, list(kind.model_fields)))
            elif problem["type"] == "missing":
                remedy = f": give --to {' or --to '.join(TARGETS)}" if name == "to" else ""
                problems.append(f"--{name.replace('_', '-')} is missing{remedy}")
            else:
                problems.append(f"{name}: {problem['msg'].lower()}, got {problem['input']!r:.80}")
        raise UserError("; ".join(problems)) from None


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: no settings need them, and nested ones grow without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name)")
        return super().compose_node(parent, index)


def parse_yaml(text: str, where: str) -> Any:
    """Settings in YAML. Raises UserError with `where` when it is none, or nested too deeply."""
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader: no tag makes an object
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}") from None


def parse_budget(text: str) -> float:
    """`25%` or `0.25` → 0.25. Raises UserError outside (0, 1]."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(%?)\s*", text)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise UserError(f"--kv-budget {text} is no share of the source's cache: write 25% or 0.25")
    return value


def parse_size(text: str | None) -> int:
    """`5GB`, `500MiB`, `1000000` → bytes. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B?)\s*", str(text).upper())
    if not match or match[2] not in _UNITS or not 0 < float(match[1]) < 1e18:
        raise UserError(f"{text!s:.60} is no size: write 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def normal_dtype(text: str | None) -> str | None:
    """`bf16` → `bfloat16`, and so on. Raises UserError for an unknown dtype."""
    if text is None:
        return None
    name = DTYPE_ALIASES.get(text.lower(), text.lower())
    if name not in DTYPE_BYTES:
        raise UserError(unknown("dtype", text, [*DTYPE_BYTES, "bf16", "fp16", "fp32"]))
    return name


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """`unknown method 'pac'. Did you mean pca? Available: …`"""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}. " + (f"Did you mean {close[0]}? " if close else "") + f"Available: {', '.join(known)}"
