"""The target's widths from what the user asked for: flags or a KV budget, with a refusal and the nearest choice that works."""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvfold.convert.families import AttentionSpec
from kvfold.convert.planning.engines import LatentShape
from kvfold.convert.planning.settings import LATENT_TARGETS, TARGETS, ConvertSettings, parse_budget
from kvfold.errors import UserError
from kvfold.surgery.names import REBUILT, full_rank, rotary_width

if TYPE_CHECKING:
    from kvfold.convert.planning.conversion_plan import ConversionPlan

SHARES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0)
"""Multiples of the mean width that are measured where budgets differ."""
SPLITS = (0.02, 0.0625, 0.125, 0.25, 0.375, 0.5)
"""Shares of MLA's cache that its rotary key may take."""
Widths = tuple[int, int]
MOST_GROWTH = 0.1
"""Share of its parameters by which a model may grow where nobody asked for a width."""


def folded_layers(spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> tuple[int, ...]:
    """The layers that are folded: where windowed ones and others mix, those that attend over everything."""
    every, full, asked = tuple(range(spec.layers)), spec.full_layers, settings.layers
    if settings.to not in LATENT_TARGETS or asked == "all" or (asked is None and not full):
        return every
    if asked in (None, "full"):
        if not full:
            refusals.append(f"--layers full: all layers attend over {spec.sliding_window} tokens: leave it out")
        return full or every
    numbers: set[int] = set()
    for part in str(asked).split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", part)
        if match is None:
            refusals.append(f"--layers {asked!s:.60} names no layers: write all, full, or numbers like 0-3,7")
            return every
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    if missing := numbers - set(every):
        refusals.append(f"--layers {asked:.60} names layer {min(missing)}, and there are 0 to {spec.layers - 1}")
    elif not numbers:
        refusals.append(f"--layers {asked:.60} names no layers: write the lower number first")
    elif full and (windowed := numbers - set(full)):
        refusals.append(
            f"--layers {asked:.60} names layer {min(windowed)}, which looks back over {spec.windows[min(windowed)]} tokens, "
            f"so that its cache is small already: choose among {', '.join(map(str, full))}, or give --layers all"
        )
    return tuple(sorted(numbers & set(every))) or every


def widest_rope(spec: AttentionSpec, settings: ConvertSettings, layout: str, parameters: Callable[[], int], folded: int) -> int:
    """The widest rotary key that the calibration text may choose for MLA in our own layout. Every query head has as many more
    columns, and the model grows by `MOST_GROWTH` at most, or as much as with one head's width. Elsewhere the width of all keys.

    `parameters` counts those of the source, which can take a while; `folded` layers share the growth.
    """
    width, full = spec.head_dim, spec.kv_heads * spec.head_dim
    if settings.to != "mla" or layout != "kvfold" or settings.method not in (None, "kvfold"):
        return full
    read = settings.q_rank or spec.hidden_size
    # what a layer gains: a number that turns costs `read` in every query head, and none in the latent's two matrices
    gained = spec.heads * (read - 2 * width)
    try:
        numbers = spec.cache_numbers * parse_budget(str(settings.kv_budget)) - kept_scalars(spec, settings)
    except UserError:
        return full
    hidden, heads = spec.hidden_size, spec.heads * width
    still = heads * (read + hidden) + (settings.q_rank or 0) * hidden + numbers * (hidden + 1 + 2 * heads) + hidden
    whole = 2 * heads * hidden + 2 * full * hidden
    spare = MOST_GROWTH * parameters() / folded + whole - still
    return full if gained <= 0 else min(full, max(width, int(spare / gained) // 2 * 2))


def latent_widths(
    spec: AttentionSpec, settings: ConvertSettings, layout: str, widest: int, refusals: list[str]
) -> tuple[int, int]:
    """Widths of the latent and of the shared key; the latter is at most `widest` where nobody asked for one."""
    width_flag = "--kv-rank" if settings.to == "mla" else "--width"
    given = settings.kv_rank if settings.to == "mla" else settings.width
    if (given is None) == (settings.kv_budget is None):
        also = " (with --rope-dim)" if settings.to == "mla" and not rebuilds(settings) else ""
        refusals.append(f"--to {settings.to} needs either {width_flag}{also} or --kv-budget")
        return 1, 2
    numbers, least = 0, {"mla": 1 if rebuilds(settings) else 4, "mfa": 4, "mfa-kr": 2}[settings.to]
    if settings.kv_budget is not None:
        try:
            numbers = int(spec.cache_numbers * parse_budget(str(settings.kv_budget))) - kept_scalars(spec, settings)
        except UserError as error:
            refusals.append(str(error))
            return 1, 2
        if numbers < least:
            refusals.append(
                f"--kv-budget {settings.kv_budget} leaves {numbers} numbers: the least is "
                f"{(least + kept_scalars(spec, settings)) / spec.cache_numbers:.2%}"
            )
            return 1, 2
    if settings.to == "mla":
        return _mla_widths(spec, settings, layout, numbers, widest, refusals)
    width = given if given is not None else (numbers // 4 * 2 if settings.to == "mfa" else numbers // 2 * 2)
    # MFA-KR has room for all keys and, behind them, all values
    widest = spec.kv_heads * spec.head_dim * (1 if settings.to == "mfa" else 2)
    if width % 2 or not 2 <= width <= widest:
        nearest = min(widest, max(2, width // 2 * 2))
        refusals.append(f"--width {width} must be even and between 2 and the full width {widest}: the nearest is {nearest}")
        width = nearest
    return (min(width, spec.hidden_size), width) if settings.to == "mfa" else (0, width)


def _mla_widths(
    spec: AttentionSpec, settings: ConvertSettings, layout: str, numbers: int, most_by_default: int, refusals: list[str]
) -> tuple[int, int]:
    width, full = spec.head_dim, full_rank(spec.hidden_size, spec.kv_heads, spec.head_dim)
    widest = (2 * spec.rope.plain_pairs(width) or width) if layout == "deepseek_v3" else spec.kv_heads * width
    if rebuilds(settings):
        rank, rope_dim = settings.kv_rank or min(full, numbers), 0
        if settings.rope_dim is not None:
            flag = "--keys rebuilt" if settings.keys == "rebuilt" else f"--method {settings.method}"
            refusals.append(f"{flag} has no rotary key of its own: leave --rope-dim out")
    elif settings.kv_rank is not None:
        rank, rope_dim = settings.kv_rank, settings.rope_dim or min(width, widest, 64)
    else:
        # At most half of the budget rotates, so that as much is left for the latent. In deepseek_v3 a frequency that turns by
        # less than a radian over the whole context does without its rotation.
        turning = sum(spec.rope.theta ** (-2 * i / width) * spec.max_positions >= 1 for i in range(width // 2))
        most = min(2 * turning, widest) if layout == "deepseek_v3" else min(widest, most_by_default)
        rope_dim = settings.rope_dim or max(2, min(most, numbers // 4 * 2))
        rank = min(full, numbers - rope_dim)
    if not rebuilds(settings) and (rope_dim % 2 or not 2 <= rope_dim <= widest):
        nearest = min(widest, max(2, rope_dim // 2 * 2))
        refusals.append(f"--rope-dim {rope_dim} must be even and at most the source's {widest}: the nearest is {nearest}")
    if not 1 <= rank <= full:
        nearest = min(full, max(1, rank))
        refusals.append(f"--kv-rank {rank} must lie between 1 and the full rank {full}: the nearest is {nearest}")
    return rank, rope_dim


def widths_to_try(plan: "ConversionPlan", rotary: bool = True) -> list[Widths]:
    """Every pair of widths that is measured, the plan's own among them; for a layer whose keys RoPE turns or not."""
    spec, mean = plan.spec, int(plan.width_numbers)
    full, widest = full_rank(spec.hidden_size, spec.kv_heads, spec.head_dim), spec.kv_heads * spec.head_dim
    turning = plan.widest_rope if plan.layout == "kvfold" else plan.rope_dim
    step = {"mfa": 4, "mfa-kr": 2, "mla": 1}[plan.settings.to]
    shares = SHARES if plan.settings.layer_budgets == "measured" else (1.0,)
    totals = sorted({max(4, int(mean * share) // step * step) for share in shares})
    if plan.settings.to == "mla" and plan.design == "latent" and not rotary:
        return list(dict.fromkeys((min(total, full), 0) for total in totals))
    tried: list[Widths] = [(plan.kv_rank, plan.rope_dim)] if plan.design == "latent" else []
    for total in totals:
        if plan.settings.to == "mfa":
            tried += [(total // 2, total // 2)] if total // 2 <= min(widest, spec.hidden_size) else []
        elif plan.design == "reused-key":
            tried += [(0, total)] if total <= 2 * widest else []
        elif plan.design == "rebuilt-key":
            tried += [(total, 0)] if total <= full else []
        else:
            ropes = sorted({min(turning, max(2, round(total * split / 2) * 2)) for split in SPLITS})
            tried += [(total - rope, rope) for rope in ropes if 1 <= total - rope <= full]
    return list(dict.fromkeys(tried))


def kept_scalars(spec: AttentionSpec, settings: ConvertSettings) -> int:
    """Numbers cached per token for the sizes of normed keys: none where keys are whole when they are normed."""
    whole = settings.to in ("gqa", "mqa") or rebuilds(settings)
    return 0 if whole or settings.key_norm == "mean" else spec.key_scalars


def rebuilds(settings: ConvertSettings) -> bool:
    """Whether keys are rebuilt from the latent, as the user or the method wants."""
    return settings.keys == "rebuilt" or (settings.to == "mla" and settings.method in REBUILT)


def baseline_widths(
    spec: AttentionSpec, settings: ConvertSettings, rank: int, rope_dim: int, note: str, refusals: list[str]
) -> tuple[int, int, str]:
    """The widths of the same cache that a published method can have, and the note on them.

    Its rotary width is the nearest below what was asked for, or its least; the latent takes what is left of the total.
    """
    method = str(settings.method)
    if settings.layer_budgets == "measured":
        refusals.append(f"--method {method} has the same widths in every layer: leave --layer-budgets out")
    if method in REBUILT:
        return rank, 0, note
    if settings.keys == "rebuilt":
        refusals.append(f"--method {method} rotates a part of its keys: leave --keys out, or use --method whitened")
        return rank, rope_dim, note
    total, rotary = rank + rope_dim, rotary_width(method, spec.kv_heads, spec.head_dim, rope_dim)
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


def refuse_query_rank(spec: AttentionSpec, settings: ConvertSettings, stored: LatentShape, refusals: list[str]) -> None:
    if settings.q_rank is not None and spec.key_norm:
        refusals.append("--q-rank is not possible where queries go through a norm: leave it out")
    full = min(spec.hidden_size, spec.heads * (stored.nope + stored.rope or spec.head_dim))
    if settings.q_rank is not None and settings.q_rank > full:
        refusals.append(f"--q-rank {settings.q_rank} is over the full rank {full} of the queries: the nearest is {full}")


def refuse_key_norm(spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> None:
    if settings.key_norm == "mean" and not spec.key_norm:
        refusals.append("--key-norm mean belongs to models whose keys go through a norm: leave it out")
    elif settings.key_norm == "mean" and rebuilds(settings):
        refusals.append("--key-norm mean has nothing to save where keys are rebuilt and normed then: leave it out")


def target_heads(spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> int:
    source = spec.kv_heads
    if settings.to not in TARGETS or settings.to == "source":
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
