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
from kvfold.surgery.latent import full_rank

TARGETS = ("gqa", "mqa", "mla")
CONTEXTS = (4096, 32768, 131072)
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
    pad_for: Literal["vllm", "vllm-cpu", "none"] | None = None
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
class LatentShape:
    """Widths of latent attention as a checkpoint stores them: latent, rotary key, rest of a key, value."""

    rank: int
    rope: int
    nope: int
    value: int


VLLM_TOTALS = {"vllm": (320, 512, 576), "vllm-cpu": (576,)}
"""Latent + rotary key for which vLLM has decoding kernels, on CUDA and on CPU."""
VLLM_HEADS = ((64, 64, 128), (128, 64, 128), (192, 64, 256))
"""(nope, rope, value) for which it has prefill kernels on CUDA."""


def padded_shape(shape: LatentShape, pad_for: str | None) -> tuple[LatentShape, str]:
    """Zero-pad to a shape that vLLM's kernels take, and say in a line what came of it.

    By default only where the cache does not grow; with `vllm` or `vllm-cpu` whatever it costs, with `none` never. A
    shape that no padding makes legal comes back as it is.
    """
    heads = next((h for h in VLLM_HEADS if shape.nope <= h[0] and shape.rope <= h[1] and shape.value <= h[2]), None)
    totals = VLLM_TOTALS["vllm-cpu" if pad_for == "vllm-cpu" else "vllm"]
    total = next((t for t in totals if heads and shape.rank + heads[1] <= t), None)
    if heads is None or total is None:
        return shape, f"no vLLM kernel takes latent {shape.rank} + {shape.rope} with heads of {shape.nope}"
    padded = LatentShape(total - heads[1], heads[1], heads[0], heads[2])
    grown = total - shape.rank - shape.rope
    if pad_for == "none" or (pad_for is None and grown):
        return shape, f"not padded for vLLM's kernels; --pad-for vllm would cache {total} numbers per token per layer"
    return padded, f"padded for vLLM's kernels, {grown} cached numbers of zeros"


@dataclass(frozen=True)
class ConversionPlan:
    """Source and target geometry, what is gained, and what stands in the way.

    Attributes:
        kv_heads: key/value heads of the target (gqa, mqa).
        kv_rank, rope_dim: widths of the latent and of the shared rotary key (mla), else 0.
        stored: these and the head widths as the checkpoint stores them, padding included (mla).
        method, grouping: resolved, with the defaults filled in.
        refusals: each a reason with the remedy; a plan that has any cannot be carried out.
    """

    family: Family
    spec: AttentionSpec
    settings: ConvertSettings
    kv_heads: int
    method: str
    grouping: str
    kv_rank: int = 0
    rope_dim: int = 0
    stored: LatentShape = LatentShape(0, 0, 0, 0)
    note: str = ""
    refusals: list[str] = field(default_factory=list)

    @property
    def layout(self) -> str:
        """The architecture that the checkpoint will name."""
        return "DeepseekV3ForCausalLM" if self.settings.to == "mla" else self.family.architecture

    @property
    def cache_numbers(self) -> int:
        """Cached numbers per token per layer of the target."""
        return self.stored.rank + self.stored.rope or 2 * self.kv_heads * self.spec.head_dim

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
        """Fewer parameters in all layers: rows of W_K and W_V and their biases; more where latents are expanded again."""
        spec, rows = self.spec, self.spec.cache_numbers - self.cache_numbers
        saved = rows * (spec.hidden_size + spec.qkv_bias)
        if self.kv_rank:
            stored = self.stored
            wider = stored.nope + stored.rope + stored.value - 2 * spec.head_dim  # queries and output
            expansion = spec.heads * (stored.nope + stored.value) * stored.rank + stored.rank  # and the latent's norm
            saved -= spec.heads * wider * spec.hidden_size + expansion
        head = spec.vocab_size * spec.hidden_size if self.kv_rank and spec.tied else 0  # written out for the engines
        return spec.layers * saved - head

    def refuse(self, converting: bool = False) -> None:
        """Raise UserError with every refusal, if there are any. Calibration text is only missed when `converting`."""
        refusals = list(self.refusals)
        if converting and self.settings.to == "mla" and self.settings.calibrate is None:
            refusals.append("--to mla needs calibration text: give --calibrate TEXT, or --calibrate self")
        if refusals:
            raise UserError("; ".join(refusals))

    def target(self) -> dict[str, Any]:
        """What the target is, as JSON data."""
        if self.settings.to == "mla":
            geometry: dict[str, Any] = {"kv_rank": self.kv_rank, "rope_dim": self.rope_dim}
            geometry |= {"stored": asdict(self.stored), "note": self.note}
        else:
            geometry = {"kv_heads": self.kv_heads, "grouping": self.grouping}
        return {"to": self.settings.to, **geometry, "method": self.method, "layout": self.layout}

    def record(self, batch: int, dtype: str, parameters: int) -> dict[str, Any]:
        """The plan as JSON data; `parameters` is the source's number."""
        return {
            "source": {**asdict(self.spec), "model_type": self.family.model_type, "parameters": parameters},
            "target": {**self.target(), "parameters": parameters - self.parameters_saved},
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
    kv_heads, kv_rank, rope_dim = spec.kv_heads, 0, 0
    stored, note = LatentShape(0, 0, 0, 0), ""
    if settings.to == "mla":
        kv_rank, rope_dim = _target_latent(spec, settings, refusals)
        stored, note = padded_shape(LatentShape(kv_rank, rope_dim, spec.head_dim, spec.head_dim), settings.pad_for)
        if settings.pad_for not in (None, "none") and not note.startswith("padded"):
            refusals.append(
                f"--pad-for {settings.pad_for} is not possible: {note}; give --rope-dim 64 or less and --kv-rank 512 or less"
            )
        _refuse_for_deepseek_v3(config, spec, settings, refusals)
        default, methods = "kvfold", ["kvfold"]
    else:
        kv_heads = _target_heads(spec, settings, refusals)
        default, methods = ("pca" if settings.calibrate else "align"), list(METHODS)
    method = settings.method or default
    if method not in methods:
        refusals.append(unknown("method", method, methods))
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
    return ConversionPlan(family, spec, settings, kv_heads, method, grouping, kv_rank, rope_dim, stored, note, refusals)


def _target_latent(spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> tuple[int, int]:
    width, full = spec.head_dim, full_rank(spec.hidden_size, spec.kv_heads, spec.head_dim)
    if settings.kv_heads is not None:
        refusals.append("mla has no key heads of its own: give --kv-rank and --rope-dim, or --kv-budget")
    if (settings.kv_rank is None) == (settings.kv_budget is None):
        refusals.append("--to mla needs either --kv-rank (with --rope-dim) or --kv-budget")
        return 1, 2
    if settings.kv_rank is not None:
        rank, rope_dim = settings.kv_rank, settings.rope_dim or min(width, 64)
    else:
        try:
            numbers = int(spec.cache_numbers * parse_budget(str(settings.kv_budget)))
        except UserError as error:
            refusals.append(str(error))
            return 1, 2
        if numbers < 4:
            least = 4 / spec.cache_numbers
            refusals.append(f"--kv-budget {settings.kv_budget} leaves {numbers} numbers: the least is {least:.2%}")
            return 1, 2
        # A frequency that turns by less than a radian over the whole context does without its rotation; at most half of the
        # budget rotates, so that as much is left for the latent.
        turning = sum(spec.rope.theta ** (-2 * i / width) * spec.reach >= 1 for i in range(width // 2))
        rope_dim = settings.rope_dim or max(2, min(2 * turning, numbers // 4 * 2))
        rank = min(full, numbers - rope_dim)
    if rope_dim % 2 or not 2 <= rope_dim <= width:
        nearest = min(width, max(2, rope_dim // 2 * 2))
        refusals.append(f"--rope-dim {rope_dim} must be even and at most the source's {width}: the nearest is {nearest}")
    if not 1 <= rank <= full:
        nearest = min(full, max(1, rank))
        refusals.append(f"--kv-rank {rank} must lie between 1 and the full rank {full}: the nearest is {nearest}")
    return rank, rope_dim


def _refuse_for_deepseek_v3(
    config: dict[str, Any], spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]
) -> None:
    """What the stock deepseek_v3 layout cannot say."""
    if spec.qkv_bias or spec.o_bias:
        refusals.append("the source has attention biases, which deepseek_v3 engines drop: use --to gqa")
    if spec.rope.type != "default":
        refusals.append(f"rope type {spec.rope.type} is none that deepseek_v3 engines keep: use --to gqa")
    if spec.sliding_window is not None:
        refusals.append("the source has a sliding window, which deepseek_v3 lacks: use --to gqa")
    if config.get("hidden_act", "silu") != "silu":
        refusals.append(f"the MLP's {config['hidden_act']} cannot be said in deepseek_v3, which has silu: use --to gqa")
    if config.get("mlp_bias"):
        refusals.append("the source has MLP biases, which deepseek_v3 lacks: use --to gqa")
    if (settings.dtype or str(config.get("dtype") or config.get("torch_dtype"))) in ("float16", "fp16", "half"):
        refusals.append("float16 cannot hold the scaled latents of this layout: give --dtype bfloat16 or float32")


def _target_heads(spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> int:
    source = spec.kv_heads
    if settings.to not in TARGETS:
        return source
    if settings.kv_rank is not None or settings.rope_dim is not None:
        refusals.append(f"--kv-rank and --rope-dim belong to --to mla, not {settings.to}: leave them out")
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
