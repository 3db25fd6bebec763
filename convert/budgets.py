"""Widths per layer by what they break: how latent and rotary key share a layer's cache, and the layers the whole cache.

One pass over the source on the calibration tokens measures, for every layer alone, the error behind it at several splits of its
cache between latent and rotary key (MLA) and, with `--layer-budgets measured`, at several totals; `allocate` then finds the
widths of least summed error.
"""

import time
from math import inf
from pathlib import Path

import torch

from kvfold.convert.calibration import observe
from kvfold.convert.conversion import Report
from kvfold.convert.duration import spoken
from kvfold.convert.methods import best_latent
from kvfold.convert.planning.plan import ConversionPlan
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.data import Windows
from kvfold.convert.source.stream import HiddenStates, SourceModel
from kvfold.surgery.latent import full_rank

SHARES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0)
"""Multiples of the mean width that are measured where budgets differ."""
SPLITS = (0.02, 0.0625, 0.125, 0.25, 0.375, 0.5)
"""Shares of MLA's cache that its rotary key may take."""
WIDTH_TOKENS = 16384
"""Calibration tokens on which widths are measured."""
Widths = tuple[int, int]
Curve = dict[int, tuple[float, Widths]]
"""Of one layer: numbers cached per token → the error, and the widths of latent and shared key that have it."""


def measured_widths(
    plan: ConversionPlan, reader: CheckpointReader, device: torch.device, windows: Windows, scratch: Path, report: Report
) -> tuple[Widths, ...]:
    """Latent and shared key of every folded layer, whose mean is at most what the plan has for each.

    `scratch` holds the hidden states where they do not fit into memory, and is removed.
    """
    tokens = windows.ids.shape[1]
    ids = windows.ids[: max(1, WIDTH_TOKENS // tokens)]
    source = SourceModel(reader, plan.family, device, tokens)
    on_disk = HiddenStates.needs_disk((*ids.shape, plan.spec.hidden_size), copies=1)
    original = source.embed(ids, scratch if on_disk else None)
    curves: list[Curve] = []
    for layer in range(plan.folded[-1] + 1):
        block = source.block(layer)
        if layer not in plan.folded:
            block.advance(original)
            continue
        report(0.0, f"measuring layer {layer + 1}/{plan.spec.layers}")
        started = time.monotonic()
        seen = observe(plan, source, layer, block, original)
        curve: Curve = {}
        for widths in widths_to_try(plan, plan.spec.turning[layer]):
            error = best_latent(plan, seen, *widths, search=False)[0]
            curve[sum(widths)] = min(curve.get(sum(widths), (inf, widths)), (error, widths))
        curves.append(curve)
        block.advance(original)
        if len(curves) == 1:
            report(None, f"measuring widths will take about {spoken((time.monotonic() - started) * len(plan.folded))}")
    scratch.unlink(missing_ok=True)
    return allocate(curves, int(plan.width_numbers) * len(plan.folded))


def widths_to_try(plan: ConversionPlan, rotary: bool = True) -> list[Widths]:
    """Every pair of widths that is measured, the plan's own among them; for a layer whose keys RoPE turns or not."""
    spec, mean = plan.spec, int(plan.width_numbers)
    full, widest = full_rank(spec.hidden_size, spec.kv_heads, spec.head_dim), spec.kv_heads * spec.head_dim
    turning = plan.widest_rope
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


def allocate(curves: list[Curve], total: int) -> tuple[Widths, ...]:
    """The widths of least summed error whose sum is at most `total`: a knapsack over the measured points, exact.

    Raises:
        ValueError: not even the smallest widths fit.
    """
    best: dict[int, tuple[float, tuple[Widths, ...]]] = {0: (0.0, ())}
    for curve in curves:
        grown: dict[int, tuple[float, tuple[Widths, ...]]] = {}
        for used, (error, chosen) in best.items():
            for numbers, (more, widths) in curve.items():
                now = used + numbers
                if now <= total and error + more < grown.get(now, (inf,))[0]:
                    grown[now] = (error + more, (*chosen, widths))
        best = grown
    if not best:
        raise ValueError(f"no widths of {len(curves)} layers sum to {total} or less")
    return min(best.values())[1]
