"""What a conversion would do: target geometry, KV-budget arithmetic, every refusal with its reason. Reads no tensors."""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from kvfold.convert.families import AttentionSpec, Family, family_of
from kvfold.convert.families.views import PART_OF, TRANSLATED, read_as
from kvfold.convert.planning.engines import (
    LatentShape,
    deepseek_v3_obstacles,
    padded_key,
    padded_shape,
    step3_text_obstacles,
)
from kvfold.convert.planning.parts import refuse_folding, refuse_part, stays_within
from kvfold.convert.planning.settings import (
    DTYPE_BYTES,
    TARGETS,
    ConvertSettings,
    normal_dtype,
    parse_size,
    unknown,
)
from kvfold.convert.planning.widths import (
    MOST_GROWTH,
    baseline_widths,
    folded_layers,
    kept_scalars,
    latent_widths,
    rebuilds,
    refuse_query_rank,
    source_parameters,
    target_heads,
    widest_rope,
    widths_to_try,
)
from kvfold.convert.source.config import resolve
from kvfold.errors import UserError
from kvfold.surgery.names import GROUPING, PUBLISHED, full_rank

NOTHING = LatentShape(0, 0, 0, 0)
CONTEXTS = (4096, 32768, 131072)
LATENT_TARGETS = ("mla", "mfa", "mfa-kr")
TURNED = 3
"""Keys that turn whole where nobody asked for a number: a constant, and those of two numbers of the latent."""
COPY = "copy"
"""The method of --to source."""
BELONGS = {
    "kv_heads": ("gqa", "mqa"),
    "grouping": ("gqa", "mqa"),
    "kv_rank": ("mla",),
    "rope_dim": ("mla",),
    "pad_for": ("mla", "mfa"),
    "width": ("mfa", "mfa-kr"),
    "q_rank": LATENT_TARGETS,
    "keys": ("mla",),
    "turned_keys": ("mla",),
    "layers": LATENT_TARGETS,
    "layer_budgets": LATENT_TARGETS,
    "layout": LATENT_TARGETS,
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
        folded: the layers that are folded; the others stay as they are.
        widths: latent and shared key of every folded layer where they differ, else empty.
        widest_rope: how wide a layer's rotary key may become where the calibration text decides it.
        method, grouping: resolved, with the defaults filled in.
        refusals: each a reason with the remedy; a plan that has any cannot be carried out.
        within: `model_type` of the larger model that is written with the folded one in it, empty where it is written alone.
    """

    family: Family
    spec: AttentionSpec
    settings: ConvertSettings
    layout: str
    folded: tuple[int, ...]
    kv_heads: int
    method: str
    grouping: str
    kv_rank: int = 0
    rope_dim: int = 0
    stored: LatentShape = NOTHING
    widths: tuple[tuple[int, int], ...] = ()
    widest_rope: int = 0
    note: str = ""
    refusals: list[str] = field(default_factory=list)
    within: str = ""

    @property
    def design(self) -> str:
        """`grouped`, or one of the three designs of the kvfold layout."""
        if self.settings.to not in LATENT_TARGETS:
            return "grouped"
        if self.settings.to == "mfa-kr":
            return "reused-key"
        return "rebuilt-key" if rebuilds(self.settings) else "latent"

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

    def turned_keys(self, rank: int, rope: int) -> int:
        """Keys that turn whole with a latent of `rank` numbers and a shared key of `rope`: none where RoPE turns none."""
        if not rope or (self.design, self.settings.to, self.layout, self.method) != ("latent", "mla", "kvfold", "kvfold"):
            return 0
        return min(TURNED if self.settings.turned_keys is None else self.settings.turned_keys, rank)

    @property
    def measures_widths(self) -> bool:
        """Whether the layers' widths wait for the calibration text: their budgets, or how latent and rotary key share one."""
        free = self.settings.kv_budget is not None and self.settings.rope_dim is None
        shared = free and self.settings.to == "mla" and self.design == "latent" and self.layout == "kvfold"
        return self.settings.layer_budgets == "measured" or (shared and self.method == "kvfold")

    def layer_widths(self, layer: int) -> tuple[int, int]:
        """Latent and shared key of a folded layer. MLA without RoPE has all in the latent."""
        rank, rope = self.widths[self.folded.index(layer)] if self.widths else (self.kv_rank, self.rope_dim)
        if self.design == "latent" and self.settings.to == "mla" and not self.spec.turning[layer]:
            return min(rank + rope, full_rank(self.spec.hidden_size, self.spec.kv_heads, self.spec.head_dim)), 0
        return rank, rope

    def layer_numbers(self, layer: int) -> int:
        """Cached numbers per token of one layer of the target."""
        if layer not in self.folded:
            return self.spec.cache_numbers
        if self.design == "grouped":
            return 2 * self.kv_heads * self.spec.head_dim
        widths = self.layer_widths(layer) if self.layout == "kvfold" else (self.stored.rank, self.stored.rope)
        return sum(widths) + kept_scalars(self.spec, self.settings)

    @property
    def cache_numbers(self) -> float:
        """Cached numbers per token per layer of the target, in the mean of all layers."""
        total = sum(map(self.layer_numbers, range(self.spec.layers)))
        return total / self.spec.layers if total % self.spec.layers else total // self.spec.layers

    @property
    def width_numbers(self) -> float:
        """Latent and shared key together, in the mean of the folded layers: without the sizes of normed keys."""
        if self.widths:
            return sum(map(sum, self.widths)) / len(self.widths)
        return self.stored.rank + self.stored.rope

    @property
    def kv_budget(self) -> float:
        """Target cache over source cache."""
        return self.cache_numbers / self.spec.cache_numbers

    def cache_bytes(self, tokens: int, batch: int, dtype: str) -> tuple[int, int]:
        """Bytes of the whole cache, source and target. A layer with a sliding window keeps no more tokens than that."""
        spec = self.spec
        kept = [batch * DTYPE_BYTES[dtype] * min(tokens, window or tokens) for window in spec.windows]
        target = sum(size * self.layer_numbers(layer) for layer, size in enumerate(kept))
        return spec.cache_numbers * sum(kept), target

    @property
    def parameters_saved_at_least(self) -> int:
        """`parameters_saved`, whatever widths the calibration text gives the layers, whose cached numbers keep their sum.

        What a layer of MLA or MFA has is affine in its widths, so the widest rotary key that is tried bounds it; in MFA-KR no
        layer has more per cached number than the widest that is tried.
        """
        if not self.measures_widths or self.widths:
            return self.parameters_saved
        mean, tried = int(self.width_numbers), widths_to_try(self)
        if self.design == "reused-key":
            without = self._latent_parameters(0, 0)
            most = without + max((self._latent_parameters(*w) - without) / sum(w) for w in tried) * mean
        elif self.design == "latent" and self.settings.to == "mla":
            most = max(self._latent_parameters(mean - rope, rope) for _, rope in tried if rope < mean)
        else:
            return self.parameters_saved
        return math.floor(len(self.folded) * (_grouped_parameters(self.spec, self.spec.kv_heads) - most))

    @property
    def parameters_saved(self) -> int:
        """Fewer parameters in all layers; less than none where latents are expanded again."""
        spec = self.spec
        whole = len(self.folded) * _grouped_parameters(spec, spec.kv_heads)
        if self.design == "grouped":
            return whole - spec.layers * _grouped_parameters(spec, self.kv_heads)
        folded = sum(self._latent_parameters(*self.layer_widths(layer)) for layer in self.folded)
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
        if spec.key_norm:  # the source's queries, and what maps them and sizes the keys, or the norms' weights
            total = spec.heads * spec.head_dim * (spec.hidden_size + spec.qkv_bias)
            if self.design == "rebuilt-key":
                total += (spec.heads + spec.kv_heads) * spec.head_dim
            else:
                total += spec.heads * width * spec.head_dim + spec.kv_heads * spec.head_dim * (spec.hidden_size + spec.qkv_bias)
        total += (self.settings.q_rank or 0) * spec.hidden_size
        total += (rank + rope) * (spec.hidden_size + 1) + spec.hidden_size * (spec.heads * spec.head_dim + 1)
        if self.design == "latent":
            return total + spec.heads * ((shape.nope + spec.head_dim) * rank + self.turned_keys(rank, rope) * shape.nope)
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
            geometry: dict[str, Any] = {"kv_heads": self.kv_heads, "grouping": self.grouping, "note": self.note}
        else:
            geometry = {"design": self.design, "kv_rank": self.kv_rank, "rope_dim": self.rope_dim}
            geometry |= {"stored": asdict(self.stored), "note": self.note}
            if self.widths:
                geometry["widths"] = self.widths
        if len(self.folded) < self.spec.layers:
            geometry["folded_layers"] = list(self.folded)
        own = {"method": self.method, "layout": self.layout, "architecture": self.architecture}
        return {"to": self.settings.to, **geometry, **own}

    def record(self, batch: int, dtype: str, parameters: int) -> dict[str, Any]:
        """The plan as JSON data; `parameters` is the source's number."""
        return {
            "source": {
                **asdict(self.spec),
                "sliding_window": self.spec.sliding_window,
                "full_layers": len(self.spec.full_layers),
                "model_type": self.family.model_type,
                "architecture": self.family.architecture,
                "parameters": parameters,
            },
            "target": {
                **self.target(),
                "parameters": parameters - self.parameters_saved_at_least,
                "parameters_are_a_bound": self.measures_widths and not self.widths,
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


def make_plan(config: dict[str, Any], settings: ConvertSettings) -> ConversionPlan:
    """Fix the target from config.json and the settings.

    Raises:
        UserError: the family is unknown or the config incomplete. What else stands in the way is collected in `refusals`.
    """
    config = read_as(config)
    family = family_of(config)
    spec, said = family.spec(config), resolve(config)
    refusals: list[str] = []
    if settings.to not in TARGETS:
        refusals.append(unknown("target", settings.to, TARGETS))
    else:
        for name, targets in BELONGS.items():
            value = getattr(settings, name)
            if value != ConvertSettings.model_fields[name].default and settings.to not in targets:
                flag = f"--{name.replace('_', '-')}" + (f" {value}" if isinstance(value, str) else "")
                refusals.append(f"{flag} belongs to --to {' or '.join(targets)}, not {settings.to}: leave it out")
    refuse_part(config, settings, refusals)
    refuse_folding(settings, refusals)
    parameters = cache(lambda: source_parameters(config, spec))
    latent = settings.to in LATENT_TARGETS
    layout, kv_heads, rank, rope_dim, most = "source", spec.kv_heads, 0, 0, 0
    stored, note = NOTHING, ""
    folded = folded_layers(spec, settings, refusals)
    if latent:
        layout, note = _layout(said, spec, settings, refusals)
        most = widest_rope(spec, settings, layout, parameters, len(folded))
        rank, rope_dim = latent_widths(spec, settings, layout, most, refusals)
        if layout == "step3_text":
            obstacles = step3_text_obstacles(said, spec, settings, rope_dim)
            refusals += [f"{reason}: use --layout kvfold" for reason in obstacles]
        if settings.to == "mla" and settings.method in PUBLISHED:
            rank, rope_dim, note = baseline_widths(spec, settings, rank, rope_dim, note, refusals)
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
        refuse_query_rank(spec, settings, stored, refusals)
        behind = "norm" if spec.key_norm else "soft cap" if spec.score_cap else "sink" if spec.sinks else ""
        if behind and settings.method in PUBLISHED and spec.qkv_bias:
            refusals.append(f"--method {settings.method} moves biases, which the {behind} behind them forbids: leave it out")
        if settings.method in PUBLISHED and not all(spec.turning[layer] for layer in folded):
            refusals.append(f"--method {settings.method} expects RoPE in every layer, and here some have none: leave it out")
        default, methods = "kvfold", ["kvfold", *(PUBLISHED if settings.to == "mla" else ())]
    else:
        kv_heads = target_heads(spec, settings, refusals)
        if not family.grouped and settings.to != "source":
            refusals.append(
                f"{family.architecture} has as many key heads as query heads, so --to {settings.to} is not possible: "
                f"use --to {', '.join(LATENT_TARGETS[:-1])} or {LATENT_TARGETS[-1]}"
            )
        default, methods = ("pca" if settings.calibrate else "align"), list(GROUPING)
    if settings.to == "source":
        default, methods = COPY, [COPY]
    method = settings.method or default
    if method not in methods:
        refusals.append(unknown("method", method, methods))
    # The paper pools neighbours; the methods that align heads first gain from choosing who meets whom.
    grouping = settings.grouping or ("similar" if method in ("align", "pca") else "neighbours")
    is_text = settings.calibrate is not None and ".safetensors" not in settings.calibrate
    if is_text and settings.window > spec.max_positions:
        refusals.append(
            f"--window {settings.window} exceeds the {spec.max_positions} positions that the source knows: "
            f"give --window {spec.max_positions}"
        )
    for check, value in ((normal_dtype, settings.dtype), (parse_size, settings.max_shard_size)):
        try:
            check(value)
        except UserError as error:
            refusals.append(str(error))
    within = config[PART_OF] if stays_within(config, settings) else ""
    how = [f"{config[TRANSLATED]} is read as {family.model_type}"] if config.get(TRANSLATED) else []
    how += [f"the language model of a {within}, whose other parts stay as they are"] if within else []
    note = "; ".join([*how, note] if note else how)
    plan = ConversionPlan(
        *(family, spec, settings, layout, folded, kv_heads, method, grouping, rank, rope_dim, stored, (), most, note, refusals),
        within=within,
    )
    if plan.measures_widths:
        plan = replace(plan, note=f"{note}; widths are measured on the calibration text")
    grown = -plan.parameters_saved_at_least / parameters() if layout == "kvfold" and not refusals else 0.0
    if grown > MOST_GROWTH:
        plan = replace(plan, note=f"{plan.note}; the model grows by up to {grown:.0%}, which --q-rank makes less")
    return plan


def _layout(said: dict[str, Any], spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> tuple[str, str]:
    """The layout and why: stock where it says all that there is to say, else ours."""
    if settings.to != "mla":
        if settings.layout == "deepseek_v3":
            refusals.append(f"--layout deepseek_v3 belongs to --to mla, not {settings.to}: leave it out")
        if settings.layout == "step3_text":
            return "step3_text", ""
        return "kvfold", f"transformers has no architecture with {settings.to}: its modelling file travels with the checkpoint"
    obstacles = deepseek_v3_obstacles(said, spec, settings)
    if settings.layout == "step3_text":
        refusals.append("--layout step3_text belongs to --to mfa, not mla: leave it out")
    if settings.layout == "deepseek_v3":
        refusals += [f"{reason}: use --layout kvfold" for reason in obstacles]
        return "deepseek_v3", ""
    if settings.layout == "kvfold" or obstacles:
        return "kvfold", f"not in deepseek_v3: {'; '.join(obstacles)}" if obstacles else "asked for"
    return "deepseek_v3", ""


def _grouped_parameters(spec: AttentionSpec, kv_heads: int) -> int:
    """Of one layer's attention with so many key heads."""
    rows, heads = 2 * kv_heads * spec.head_dim, spec.heads * spec.head_dim
    norms = {"": 0, "head": 2 * spec.head_dim, "whole": heads + rows // 2}[spec.key_norm]
    return norms + (heads + rows) * (spec.hidden_size + spec.qkv_bias) + spec.hidden_size * (heads + spec.o_bias)


def cache_dtype(config: dict[str, Any], settings: ConvertSettings) -> str:
    """The dtype the cache will have: the checkpoint's, unless `--dtype` changes it."""
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return normal_dtype(settings.dtype) or (stated if stated in DTYPE_BYTES else "float32")
