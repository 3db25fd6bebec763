"""What a conversion would do: target geometry, KV-budget arithmetic, every refusal with its reason. Reads no tensors."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvfold.convert.families import AttentionSpec, Family, family_of
from kvfold.convert.source import build_on_meta
from kvfold.errors import UserError
from kvfold.surgery.grouping import METHODS

TARGETS = ("gqa", "mqa")
CONTEXTS = (4096, 32768, 131072)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "f32": "float32", "half": "float16"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ConvertSettings(BaseModel):
    """Everything that decides what a conversion writes. Recorded in kvfold.json, and readable from there."""

    model_config = ConfigDict(extra="forbid")

    to: str
    kv_heads: int | None = None
    kv_budget: Annotated[str | None, BeforeValidator(lambda v: str(v) if isinstance(v, float) else v)] = None
    method: str | None = None
    grouping: Literal["neighbours", "similar"] | None = None
    calibrate: str | None = None
    calibration_tokens: int = Field(131072, gt=0)
    window: int = Field(512, ge=2)
    heal_steps: int = Field(300, ge=0)
    heal_window: int = Field(2, ge=1)
    heal_batch_tokens: int = Field(4096, ge=1)
    heal_lr: float = Field(2e-2, gt=0)
    heal_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    dtype: str | None = None
    device: str = "auto"
    max_shard_size: str = "5GB"
    seed: int = Field(0, ge=0, lt=2**32)
    revision: str | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """Source and target geometry, what is gained, and what stands in the way.

    Attributes:
        kv_heads: key/value heads of the target.
        method, grouping: resolved, with the defaults filled in.
        refusals: each a reason with the remedy; a plan that has any cannot be carried out.
    """

    family: Family
    spec: AttentionSpec
    settings: ConvertSettings
    kv_heads: int
    method: str
    grouping: str
    refusals: list[str] = field(default_factory=list)

    @property
    def cache_numbers(self) -> int:
        """Cached numbers per token per layer of the target."""
        return 2 * self.kv_heads * self.spec.head_dim

    @property
    def kv_budget(self) -> float:
        """Target cache over source cache."""
        return self.cache_numbers / self.spec.cache_numbers

    def cache_bytes(self, tokens: int, batch: int, dtype: str) -> tuple[int, int]:
        """Bytes of the whole cache, source and target."""
        scale = tokens * batch * self.spec.layers * DTYPE_BYTES[dtype]
        return self.spec.cache_numbers * scale, self.cache_numbers * scale

    @property
    def parameters_saved(self) -> int:
        """Fewer parameters in all layers: rows of W_K and W_V, and their biases."""
        rows = self.spec.cache_numbers - self.cache_numbers
        return self.spec.layers * rows * (self.spec.hidden_size + self.spec.qkv_bias)

    def refuse(self) -> None:
        """Raise UserError with every refusal, if there are any."""
        if self.refusals:
            raise UserError("; ".join(self.refusals))

    def record(self, batch: int, dtype: str, parameters: int) -> dict[str, Any]:
        """The plan as JSON data; `parameters` is the source's number."""
        return {
            "source": {**asdict(self.spec), "model_type": self.family.model_type, "parameters": parameters},
            "target": {
                "to": self.settings.to,
                "kv_heads": self.kv_heads,
                "method": self.method,
                "grouping": self.grouping,
                "layout": self.family.architecture,
                "parameters": parameters - self.parameters_saved,
            },
            "cache_numbers_per_token_per_layer": {"source": self.spec.cache_numbers, "target": self.cache_numbers},
            "cache_bytes_per_token": dict(zip(("source", "target"), self.cache_bytes(1, 1, dtype), strict=True)),
            "kv_budget": self.kv_budget,
            "cache_bytes": [
                {
                    "context": n,
                    "batch": batch,
                    **dict(zip(("source", "target"), self.cache_bytes(n, batch, dtype), strict=True)),
                }
                for n in CONTEXTS
            ],
            "cache_dtype": dtype,
            "refusals": self.refusals,
        }


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
                problems.append(f"{name}: {problem['msg'].lower()}, got {problem['input']!r}")
        raise UserError("; ".join(problems)) from None


def make_plan(config: dict[str, Any], settings: ConvertSettings) -> ConversionPlan:
    """Fix the target from config.json and the settings.

    Raises:
        UserError: the family is unknown or the config incomplete. What else stands in the way is collected in `refusals`.
    """
    family = family_of(config)
    spec = family.spec(config)
    refusals: list[str] = []
    if settings.to not in TARGETS:
        refusals.append(unknown("target", settings.to, TARGETS))
    kv_heads = _target_heads(spec, settings, refusals)
    method = settings.method or ("pca" if settings.calibrate else "align")
    if method not in METHODS:
        refusals.append(unknown("method", method, list(METHODS)))
    # The paper pools neighbours; the methods that align heads first gain from choosing who meets whom.
    grouping = settings.grouping or ("similar" if method in ("align", "pca") else "neighbours")
    is_text = settings.calibrate is not None and ".safetensors" not in settings.calibrate
    if is_text and settings.window > spec.reach:
        refusals.append(
            f"--window {settings.window} exceeds the {spec.reach} tokens that the source attends over: "
            f"give --window {spec.reach}"
        )
    for check, value in ((normal_dtype, settings.dtype), (parse_size, settings.max_shard_size)):
        try:
            check(value)
        except UserError as error:
            refusals.append(str(error))
    return ConversionPlan(family, spec, settings, kv_heads, method, grouping, refusals)


def _target_heads(spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> int:
    source = spec.kv_heads
    if settings.to not in TARGETS:
        return source
    divisors = [g for g in range(1, source + 1) if source % g == 0]
    ways = f"its {source} key heads divide into {', '.join(map(str, divisors))}"
    if settings.to == "mqa":
        if settings.kv_heads not in (None, 1) or settings.kv_budget is not None:
            refusals.append("mqa has one key head: leave --kv-heads and --kv-budget out, or use --to gqa")
        return 1
    if (settings.kv_heads is None) == (settings.kv_budget is None):
        refusals.append(f"--to gqa needs either --kv-heads or --kv-budget: {ways}")
        return source
    wanted: float
    if settings.kv_heads is not None:
        wanted, asked = settings.kv_heads, f"--kv-heads {settings.kv_heads}"
    else:
        try:
            wanted, asked = source * parse_budget(str(settings.kv_budget)), f"--kv-budget {settings.kv_budget}"
        except UserError as error:
            refusals.append(str(error))
            return source
    if wanted in divisors:
        return int(wanted)
    nearest = min(divisors, key=lambda g: abs(g - wanted))
    refusals.append(f"{asked} is not possible: {ways}; the nearest is --kv-heads {nearest}, a budget of {nearest / source:.3g}")
    return nearest


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
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"{text} is no size: write 5GB, 500MB or 2GiB")
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


def cache_dtype(config: dict[str, Any], settings: ConvertSettings) -> str:
    """The dtype the cache will have: the checkpoint's, unless `--dtype` changes it."""
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return normal_dtype(settings.dtype) or (stated if stated in DTYPE_BYTES else "float32")


def count_parameters(config: dict[str, Any]) -> int:
    """Parameters of the source, tied ones once. Raises UserError when transformers cannot build it."""
    return build_on_meta(config).num_parameters()
