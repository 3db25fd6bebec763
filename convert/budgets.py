"""Widths per layer by what they break: how latent and rotary key share a layer's cache, and the layers the whole cache.

One pass over the source on the calibration tokens measures, for every layer alone, the error behind it at several splits of its
cache between latent and rotary key (MLA) and, with `--layer-budgets measured`, at several totals; `allocate` then finds the
widths of least summed error, or `alike` where a layout has the same in all layers.
"""

import time
from functools import partial
from math import inf
from pathlib import Path

import torch

from kvfold.convert import processes
from kvfold.convert.calibration import Observed, observe
from kvfold.convert.conversion import Report
from kvfold.convert.duration import spoken
from kvfold.convert.methods import best_latent
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.planning.widths import Widths, widths_to_try
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.data import Windows
from kvfold.convert.source.stream import SourceModel

WIDTH_TOKENS = 16384
"""Calibration tokens on which widths are measured."""
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
    scratch = processes.own_file(scratch)
    original = source.embed(ids, scratch)
    measured: list[dict[Widths, float]] = []
    for layer in range(plan.folded[-1] + 1):
        block = source.block(layer)
        if layer not in plan.folded:
            block.advance(original)
            continue
        report(0.0, f"measuring layer {layer + 1}/{plan.spec.layers}")
        started = time.monotonic()
        seen = observe(plan, source, layer, block, original, lambda line: report(None, line))
        tried = widths_to_try(plan, plan.spec.turning[layer])
        errors = processes.spread(tried, partial(_error, plan, seen.alone()))
        measured.append(dict(zip(tried, errors, strict=True)))
        block.advance(original, known=seen.passed)
        if len(measured) == 1:
            report(None, f"measuring widths will take about {spoken((time.monotonic() - started) * len(plan.folded))}")
    scratch.unlink(missing_ok=True)
    if plan.layout == "deepseek_v3":
        return (alike(measured),) * len(plan.folded)
    return allocate([best_of_totals(errors) for errors in measured], int(plan.width_numbers) * len(plan.folded))


def _error(plan: ConversionPlan, seen: Observed, _: int, widths: Widths) -> float:
    """What these widths break."""
    return best_latent(plan, seen, *widths, search=False)[0]


def alike(measured: list[dict[Widths, float]]) -> Widths:
    """Where all layers must have the same, the widths of least summed error."""
    return min(measured[0], key=lambda widths: sum(errors[widths] for errors in measured))


def best_of_totals(errors: dict[Widths, float]) -> Curve:
    """Of one layer, what is best of every total."""
    curve: Curve = {}
    for widths, error in errors.items():
        curve[sum(widths)] = min(curve.get(sum(widths), (inf, widths)), (error, widths))
    return curve


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
