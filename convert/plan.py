"""What a conversion would do: target geometry, KV-budget arithmetic, every refusal with its reason. Reads no tensors."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from kvfold.convert.engines import (
    LatentShape,
    deepseek_v3_obstacles,
    padded_key,
    padded_shape,
    step3_text_obstacles,
)
from kvfold.convert.families import AttentionSpec, Family, family_of
from kvfold.convert.settings import (
    DTYPE_BYTES,
    TARGETS,
    ConvertSettings,
    normal_dtype,
    parse_budget,
    parse_size,
    unknown,
)
from kvfold.convert.source import build_on_meta
from kvfold.errors import UserError
from kvfold.surgery import baselines
from kvfold.surgery.grouping import METHODS
from kvfold.surgery.latent import full_rank

NOTHING = LatentShape(0, 0, 0, 0)
CONTEXTS = (4096, 32768, 131072)
LATENT_TARGETS = ("mla", "mfa", "mfa-kr")
BELONGS = {
    "kv_heads": ("gqa", "mqa"),
    "grouping": ("gqa", "mqa"),
    "kv_rank": ("mla",),
    "rope_dim": ("mla",),
    "pad_for": ("mla", "mfa"),
    "width": ("mfa", "mfa-kr"),
    "q_rank": LATENT_TARGETS,
}
"""Settings that only some targets have."""


@dataclass(frozen=True)
class ConversionPlan:
    """Source and target geometry, what is gained, and what stands in the way.

    Attributes:
        layout: `source`, `deepseek_v3`, `step3_text` or `kvfold`, a module of `layouts`.
        kv_heads: key/value heads of the target (gqa, mqa), else the source's.
        kv_rank, rope_dim: widths of the latent and of the shared key (mla; both the width for mfa, no latent for mfa-kr).
        stored: these and the head widths as the checkpoint stores them, padding included.
        widths: latent and shared key of every layer where they differ, else empty.
        method, grouping: resolved, with the defaults filled in.
        refusals: each a reason with the remedy; a plan that has any cannot be carried out.
    """

    family: Family
    spec: AttentionSpec
    settings: ConvertSettings
    layout: str
    kv_heads: int
    method: str
    grouping: str
    kv_rank: int = 0
    rope_dim: int = 0
    stored: LatentShape = NOTHING
    widths: tuple[tuple[int, int], ...] = ()
    note: str = ""
    refusals: list[str] = field(default_factory=list)

    @property
    def design(self) -> str:
        """`grouped`, or one of the three designs of the kvfold layout."""
        if self.settings.to not in LATENT_TARGETS:
            return "grouped"
        if self.settings.to == "mfa-kr":
            return "reused-key"
        return "rebuilt-key" if _rebuilds(self.settings) else "latent"

    @property
    def architecture(self) -> str:
        """The class that the checkpoint will name."""
        own = {
            "deepseek_v3": "DeepseekV3ForCausalLM",
            "step3_text": "Step3TextForCausalLM",
            "kvfold": "KvfoldForCausalLM",
        }
        return own.get(self.layout, self.family.architecture)

    @property
    def q_rank(self) -> int | None:
        """Rank of the queries, None where they are read at once; step3_text always goes through one, at least the full one."""
        if self.settings.q_rank is None and self.layout == "step3_text":
            return min(self.spec.hidden_size, self.spec.heads * self.rope_dim)
        return self.settings.q_rank

    def layer_widths(self, layer: int) -> tuple[int, int]:
        """Latent and shared key of a layer."""
        return self.widths[layer] if self.widths else (self.kv_rank, self.rope_dim)

    @property
    def cache_numbers(self) -> float:
        """Cached numbers per token per layer of the target, in the mean of the layers."""
        if self.design == "grouped":
            return 2 * self.kv_heads * self.spec.head_dim
        if self.widths:
            return sum(map(sum, self.widths)) / len(self.widths)
        return self.stored.rank + self.stored.rope

    @property
    def kv_budget(self) -> float:
        """Target cache over source cache."""
        return self.cache_numbers / self.spec.cache_numbers

    def cache_bytes(self, tokens: int, batch: int, dtype: str) -> tuple[int, int]:
        """Bytes of the whole cache, source and target."""
        scale = tokens * batch * self.spec.layers * DTYPE_BYTES[dtype]
        return self.spec.cache_numbers * scale, round(self.cache_numbers * scale)

    @property
    def parameters_saved(self) -> int:
        """Fewer parameters in all layers; less than none where latents are expanded again."""
        spec = self.spec
        whole = spec.layers * _grouped_parameters(spec, spec.kv_heads)
        if self.design == "grouped":
            return whole - spec.layers * _grouped_parameters(spec, self.kv_heads)
        folded = sum(self._latent_parameters(*self.layer_widths(layer)) for layer in range(spec.layers))
        head = spec.vocab_size * spec.hidden_size if self.layout != "kvfold" and spec.tied else 0
        return whole - folded - head  # engines want the output embedding written out

    def _latent_parameters(self, rank: int, rope: int) -> int:
        """Of one layer's attention."""
        spec, shape = self.spec, self.stored
        if self.layout == "deepseek_v3":  # with the latent's norm
            rank, queries, heads = shape.rank, (shape.nope + shape.rope) * spec.hidden_size, shape.nope + shape.value
            cached = (shape.rank + shape.rope) * spec.hidden_size + rank
            return spec.heads * (queries + heads * rank + shape.value * spec.hidden_size) + cached
        if self.layout == "step3_text":  # with the queries' norm
            read = self.q_rank or 0
            queries = read * (spec.hidden_size + 1) + spec.heads * shape.rope * read
            return queries + 2 * shape.rope * spec.hidden_size + spec.heads * shape.rope * spec.hidden_size
        width = {"latent": shape.nope + rope, "reused-key": rope, "rebuilt-key": spec.head_dim}[self.design]
        total = spec.heads * width * ((self.settings.q_rank or spec.hidden_size) + spec.qkv_bias)
        total += (self.settings.q_rank or 0) * spec.hidden_size
        total += (rank + rope) * (spec.hidden_size + 1) + spec.hidden_size * (spec.heads * spec.head_dim + 1)
        if self.design == "latent":
            return total + spec.heads * (shape.nope + spec.head_dim) * rank
        if self.design == "reused-key":
            return total + rope * rope + rope + spec.heads * spec.head_dim * rope
        return total + spec.kv_heads * spec.head_dim * (2 * rank + 1)

    def refuse(self, converting: bool = False) -> None:
        """Raise UserError with every refusal, if there are any. Calibration text is only missed when `converting`."""
        refusals = list(self.refusals)
        if converting and self.design != "grouped" and self.settings.calibrate is None:
            refusals.append(f"--to {self.settings.to} needs calibration text: give --calibrate TEXT, or --calibrate self")
        if refusals:
            raise UserError("; ".join(refusals))

    def target(self) -> dict[str, Any]:
        """What the target is, as JSON data."""
        if self.design == "grouped":
            geometry: dict[str, Any] = {"kv_heads": self.kv_heads, "grouping": self.grouping}
        else:
            geometry = {"design": self.design, "kv_rank": self.kv_rank, "rope_dim": self.rope_dim}
            geometry |= {"stored": asdict(self.stored), "note": self.note}
            if self.widths:
                geometry["widths"] = self.widths
        own = {"method": self.method, "layout": self.layout, "architecture": self.architecture}
        return {"to": self.settings.to, **geometry, **own}

    def record(self, batch: int, dtype: str, parameters: int) -> dict[str, Any]:
        """The plan as JSON data; `parameters` is the source's number."""
        return {
            "source": {
                **asdict(self.spec),
                "model_type": self.family.model_type,
                "architecture": self.family.architecture,
                "parameters": parameters,
            },
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
    else:
        for name, targets in BELONGS.items():
            if getattr(settings, name) is not None and settings.to not in targets:
                flag = f"--{name.replace('_', '-')}"
                refusals.append(f"{flag} belongs to --to {' or '.join(targets)}, not {settings.to}: leave it out")
    latent = settings.to in LATENT_TARGETS
    if settings.layer_budgets == "measured" and not latent:
        refusals.append(
            f"--layer-budgets measured belongs to --to {' or '.join(LATENT_TARGETS)}, not {settings.to}: leave it out"
        )
    if settings.keys == "rebuilt" and settings.to != "mla":
        refusals.append(f"--keys rebuilt belongs to --to mla, not {settings.to}: leave it out")
    layout, kv_heads, rank, rope_dim = "source", spec.kv_heads, 0, 0
    stored, note = NOTHING, ""
    if latent:
        layout, note = _layout(config, spec, settings, refusals)
        rank, rope_dim = _target_widths(spec, settings, layout, refusals)
        if layout == "step3_text":
            obstacles = step3_text_obstacles(config, spec, settings, rope_dim)
            refusals += [f"{reason}: use --layout kvfold" for reason in obstacles]
        if settings.to == "mla" and settings.method in baselines.METHODS:
            rank, rope_dim, note = _baseline_widths(spec, settings, rank, rope_dim, note, refusals)
        stored = LatentShape(rank, rope_dim, 0 if settings.to == "mfa" else spec.head_dim, spec.head_dim)
        if layout == "deepseek_v3":
            stored, note = padded_shape(stored, settings.pad_for)
        elif layout == "step3_text" and not refusals:
            stored, note = padded_key(rope_dim, settings.pad_for)
        if settings.pad_for not in (None, "none") and layout == "kvfold":
            refusals.append(
                f"--pad-for {settings.pad_for} pads for engines, and this is the kvfold layout ({note}): leave it out"
            )
        elif settings.pad_for not in (None, "none") and layout == "deepseek_v3" and not note.startswith("padded"):
            refusals.append(
                f"--pad-for {settings.pad_for} is not possible: {note}; give --rope-dim 64 or less and --kv-rank 512 or less"
            )
        _refuse_query_rank(spec, settings, stored, refusals)
        default, methods = "kvfold", ["kvfold", *(baselines.METHODS if settings.to == "mla" else ())]
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
    return ConversionPlan(
        family, spec, settings, layout, kv_heads, method, grouping, rank, rope_dim, stored, note=note, refusals=refusals
    )


def _layout(config: dict[str, Any], spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> tuple[str, str]:
    """The layout and why: stock where it says all that there is to say, else ours."""
    if settings.to != "mla":
        if settings.layout == "deepseek_v3":
            refusals.append(f"--layout deepseek_v3 belongs to --to mla, not {settings.to}: leave it out")
        if settings.layout == "step3_text":
            return "step3_text", ""
        return "kvfold", f"transformers has no architecture with {settings.to}: its modelling file travels with the checkpoint"
    obstacles = deepseek_v3_obstacles(config, spec, settings)
    if settings.layout == "step3_text":
        refusals.append("--layout step3_text belongs to --to mfa, not mla: leave it out")
    if settings.layout == "deepseek_v3":
        refusals += [f"{reason}: use --layout kvfold" for reason in obstacles]
        return "deepseek_v3", ""
    if settings.layout == "kvfold" or obstacles:
        return "kvfold", f"not in deepseek_v3: {'; '.join(obstacles)}" if obstacles else "asked for"
    return "deepseek_v3", ""


def _target_widths(spec: AttentionSpec, settings: ConvertSettings, layout: str, refusals: list[str]) -> tuple[int, int]:
    """Widths of the latent and of the shared key."""
    width_flag = "--kv-rank" if settings.to == "mla" else "--width"
    given = settings.kv_rank if settings.to == "mla" else settings.width
    if (given is None) == (settings.kv_budget is None):
        also = " (with --rope-dim)" if settings.to == "mla" and not _rebuilds(settings) else ""
        refusals.append(f"--to {settings.to} needs either {width_flag}{also} or --kv-budget")
        return 1, 2
    numbers, least = 0, {"mla": 1 if _rebuilds(settings) else 4, "mfa": 4, "mfa-kr": 2}[settings.to]
    if settings.kv_budget is not None:
        try:
            numbers = int(spec.cache_numbers * parse_budget(str(settings.kv_budget)))
        except UserError as error:
            refusals.append(str(error))
            return 1, 2
        if numbers < least:
            refusals.append(
                f"--kv-budget {settings.kv_budget} leaves {numbers} numbers: the least is {least / spec.cache_numbers:.2%}"
            )
            return 1, 2
    if settings.to == "mla":
        return _mla_widths(spec, settings, layout, numbers, refusals)
    width = given if given is not None else (numbers // 4 * 2 if settings.to == "mfa" else numbers // 2 * 2)
    # MFA-KR has room for all keys and, behind them, all values
    widest = spec.kv_heads * spec.head_dim * (1 if settings.to == "mfa" else 2)
    if width % 2 or not 2 <= width <= widest:
        nearest = min(widest, max(2, width // 2 * 2))
        refusals.append(f"--width {width} must be even and between 2 and the full width {widest}: the nearest is {nearest}")
        width = nearest
    return (min(width, spec.hidden_size), width) if settings.to == "mfa" else (0, width)


def _mla_widths(
    spec: AttentionSpec, settings: ConvertSettings, layout: str, numbers: int, refusals: list[str]
) -> tuple[int, int]:
    width, full = spec.head_dim, full_rank(spec.hidden_size, spec.kv_heads, spec.head_dim)
    widest = width if layout == "deepseek_v3" else spec.kv_heads * width
    if _rebuilds(settings):
        rank, rope_dim = settings.kv_rank or min(full, numbers), 0
        if settings.rope_dim is not None:
            flag = "--keys rebuilt" if settings.keys == "rebuilt" else f"--method {settings.method}"
            refusals.append(f"{flag} has no rotary key of its own: leave --rope-dim out")
    elif settings.kv_rank is not None:
        rank, rope_dim = settings.kv_rank, settings.rope_dim or min(width, 64)
    else:
        # A frequency that turns by less than a radian over the whole context does without its rotation; at most half of the
        # budget rotates, so that as much is left for the latent.
        turning = sum(spec.rope.theta ** (-2 * i / width) * spec.reach >= 1 for i in range(width // 2))
        rope_dim = settings.rope_dim or max(2, min(2 * turning, numbers // 4 * 2))
        rank = min(full, numbers - rope_dim)
    if not _rebuilds(settings) and (rope_dim % 2 or not 2 <= rope_dim <= widest):
        nearest = min(widest, max(2, rope_dim // 2 * 2))
        refusals.append(f"--rope-dim {rope_dim} must be even and at most the source's {widest}: the nearest is {nearest}")
    if not 1 <= rank <= full:
        nearest = min(full, max(1, rank))
        refusals.append(f"--kv-rank {rank} must lie between 1 and the full rank {full}: the nearest is {nearest}")
    return rank, rope_dim


def _rebuilds(settings: ConvertSettings) -> bool:
    """Whether keys are rebuilt from the latent, as the user or the method wants."""
    return settings.keys == "rebuilt" or (settings.to == "mla" and settings.method in baselines.REBUILT)


def _baseline_widths(
    spec: AttentionSpec, settings: ConvertSettings, rank: int, rope_dim: int, note: str, refusals: list[str]
) -> tuple[int, int, str]:
    """The widths of the same cache that a published method can have, and the note on them.

    Its rotary width is the nearest below what was asked for, or its least; the latent takes what is left of the total.
    """
    method = str(settings.method)
    if settings.layer_budgets == "measured":
        refusals.append(f"--method {method} has the same widths in every layer: leave --layer-budgets out")
    if method in baselines.REBUILT:
        return rank, 0, note
    if settings.keys == "rebuilt":
        refusals.append(f"--method {method} rotates a part of its keys: leave --keys out, or use --method whitened")
        return rank, rope_dim, note
    total, rotary = rank + rope_dim, baselines.rotary_width(method, spec.kv_heads, spec.head_dim, rope_dim)
    if rotary >= total:
        least = math.ceil((rotary + 1) / spec.cache_numbers * 1e4) / 1e4
        refusals.append(
            f"--method {method} rotates at least {rotary} numbers, which leaves no latent of {total}: "
            f"the least is --kv-rank 1 --rope-dim {rotary}, or --kv-budget {least:.2%}"
        )
        return rank, rope_dim, note
    if rotary != rope_dim:
        note += f"; {method} rotates {rotary} numbers in place of {rope_dim}, the latent has the rest of the {total}"
    return min(total - rotary, full_rank(spec.hidden_size, spec.kv_heads, spec.head_dim)), rotary, note


def _refuse_query_rank(spec: AttentionSpec, settings: ConvertSettings, stored: LatentShape, refusals: list[str]) -> None:
    full = min(spec.hidden_size, spec.heads * (stored.nope + stored.rope or spec.head_dim))
    if settings.q_rank is not None and settings.q_rank > full:
        refusals.append(f"--q-rank {settings.q_rank} is over the full rank {full} of the queries: the nearest is {full}")


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


def _grouped_parameters(spec: AttentionSpec, kv_heads: int) -> int:
    """Of one layer's attention with so many key heads."""
    rows, heads = 2 * kv_heads * spec.head_dim, spec.heads * spec.head_dim
    return (heads + rows) * (spec.hidden_size + spec.qkv_bias) + spec.hidden_size * (heads + spec.o_bias)


def cache_dtype(config: dict[str, Any], settings: ConvertSettings) -> str:
    """The dtype the cache will have: the checkpoint's, unless `--dtype` changes it."""
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return normal_dtype(settings.dtype) or (stated if stated in DTYPE_BYTES else "float32")


def count_parameters(config: dict[str, Any]) -> int:
    """Parameters of the source, tied ones once. Raises UserError when transformers cannot build it."""
    return build_on_meta(config).num_parameters()
