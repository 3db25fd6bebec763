"""Fixes the target from config.json and the settings, and collects what stands in the way. Reads no tensors."""

from dataclasses import replace
from functools import cache
from typing import Any

from kvfold.convert.families import AttentionSpec, Family, family_of
from kvfold.convert.families.views import PART_OF, TRANSLATED, read_as
from kvfold.convert.planning.conversion_plan import NOTHING, ConversionPlan
from kvfold.convert.planning.engines import biases_read_off, layout_for, stored_shape
from kvfold.convert.planning.parameters import saved_at_least, source_parameters
from kvfold.convert.planning.parts import refuse_folding, refuse_part, stays_within
from kvfold.convert.planning.settings import (
    DTYPE_BYTES,
    LATENT_TARGETS,
    TARGETS,
    ConvertSettings,
    normal_dtype,
    parse_size,
    unknown,
)
from kvfold.convert.planning.widths import (
    MOST_GROWTH,
    Widths,
    baseline_widths,
    folded_layers,
    latent_widths,
    refuse_key_norm,
    refuse_query_rank,
    target_heads,
    widest_rope,
)
from kvfold.convert.source.config import resolve
from kvfold.errors import UserError
from kvfold.surgery.names import GROUPING, PUBLISHED

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
    "key_norm": LATENT_TARGETS,
    "biases": ("mla",),
    "layers": LATENT_TARGETS,
    "layer_budgets": LATENT_TARGETS,
    "layout": LATENT_TARGETS,
}
"""Settings that only some targets have."""


def make_plan(config: dict[str, Any], settings: ConvertSettings) -> ConversionPlan:
    """Fix the target from config.json and the settings.

    Raises:
        UserError: the family is unknown or the config incomplete. What else stands in the way is collected in `refusals`.
    """
    config = read_as(config)
    family = family_of(config)
    spec, said = family.spec(config), resolve(config)
    refusals: list[str] = []
    _refuse_misplaced(settings, refusals)
    refuse_part(config, settings, refusals)
    refuse_folding(settings, refusals)
    parameters = cache(lambda: source_parameters(config, spec))
    layout, kv_heads, rank, rope_dim, most = "source", spec.kv_heads, 0, 0, 0
    stored, note = NOTHING, ""
    folded = folded_layers(spec, settings, refusals)
    if settings.to in LATENT_TARGETS:
        layout, note = layout_for(said, spec, settings, refusals)
        most = widest_rope(spec, settings, layout, parameters, len(folded))
        rank, rope_dim = latent_widths(spec, settings, layout, most, refusals)
        if settings.to == "mla" and settings.method in PUBLISHED:
            rank, rope_dim, note = baseline_widths(spec, settings, rank, rope_dim, note, refusals)
            _refuse_published(spec, settings, folded, refusals)
        stored, note = stored_shape(said, spec, settings, layout, (rank, rope_dim), note, refusals)
        refuse_query_rank(spec, settings, stored, refusals)
        refuse_key_norm(spec, settings, refusals)
        note = biases_read_off(spec, settings, layout, note, refusals)
    else:
        kv_heads = target_heads(spec, settings, refusals)
        _refuse_ungrouped(family, spec, settings, refusals)
    method = _method(settings, refusals)
    # The paper pools neighbours; the methods that align heads first gain from choosing who meets whom.
    grouping = settings.grouping or ("similar" if method in ("align", "pca") else "neighbours")
    _refuse_values(spec, settings, refusals)
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
    grown = -saved_at_least(plan) / parameters() if layout == "kvfold" and not refusals else 0.0
    if grown > MOST_GROWTH:
        plan = replace(plan, note=f"{plan.note}; the model grows by up to {grown:.0%}, which --q-rank makes less")
    return plan


def settled(plan: ConversionPlan, config: dict[str, Any], widths: tuple[Widths, ...]) -> ConversionPlan:
    """The plan with the widths of every folded layer that the calibration text has shown; in `deepseek_v3` all are the same."""
    if plan.layout == "kvfold":
        return replace(plan, widths=widths)
    rank, rope_dim = widths[0]
    asked = plan.settings.model_copy(update={"kv_budget": None, "kv_rank": rank, "rope_dim": rope_dim})
    return replace(make_plan(config, asked), settings=plan.settings)


def _refuse_misplaced(settings: ConvertSettings, refusals: list[str]) -> None:
    if settings.to not in TARGETS:
        refusals.append(unknown("target", settings.to, TARGETS))
        return
    for name, targets in BELONGS.items():
        value = getattr(settings, name)
        if value != ConvertSettings.model_fields[name].default and settings.to not in targets:
            flag = f"--{name.replace('_', '-')}" + (f" {value}" if isinstance(value, str) else "")
            refusals.append(f"{flag} belongs to --to {' or '.join(targets)}, not {settings.to}: leave it out")


def _refuse_published(spec: AttentionSpec, settings: ConvertSettings, folded: tuple[int, ...], refusals: list[str]) -> None:
    behind = "norm" if spec.key_norm else "soft cap" if spec.score_cap else "sink" if spec.sinks else ""
    if behind and spec.qkv_bias:
        refusals.append(f"--method {settings.method} moves biases, which the {behind} behind them forbids: leave it out")
    if not all(spec.turning[layer] for layer in folded):
        refusals.append(f"--method {settings.method} expects RoPE in every layer, and here some have none: leave it out")


def _refuse_ungrouped(family: Family, spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> None:
    if not family.grouped and settings.to != "source":
        reason = f"{family.architecture} has as many key heads as query heads"
        if spec.key_norm == "centred":
            reason = "every head goes through a LayerNorm of its own (use_qk_norm), behind which heads cannot be merged"
        others = f"{', '.join(LATENT_TARGETS[:-1])} or {LATENT_TARGETS[-1]}"
        refusals.append(f"{reason}, so --to {settings.to} is not possible: use --to {others}")


def _method(settings: ConvertSettings, refusals: list[str]) -> str:
    """The method asked for, or the target's own."""
    if settings.to == "source":
        default, methods = COPY, [COPY]
    elif settings.to in LATENT_TARGETS:
        default, methods = "kvfold", ["kvfold", *(PUBLISHED if settings.to == "mla" else ())]
    else:
        default, methods = ("pca" if settings.calibrate else "align"), list(GROUPING)
    method = settings.method or default
    if method not in methods:
        refusals.append(unknown("method", method, methods))
    return method


def _refuse_values(spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> None:
    """What every target takes, and not with this value."""
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


def cache_dtype(config: dict[str, Any], settings: ConvertSettings) -> str:
    """The dtype the cache will have: the checkpoint's, unless `--dtype` changes it."""
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return normal_dtype(settings.dtype) or (stated if stated in DTYPE_BYTES else "float32")
