"""What a conversion will take: operations by step, seconds on a device, memory and disk. An estimate from the plan alone.

Operations are counted as the loops of convert/ do them, leading terms only: matrix products by dtype, causal attention, n³ of
eigendecompositions, and numbers that are passed through one by one. speed.py says how many of each a device does in a second,
benchmarks/cost.py how far this is off. Reading and writing files is not counted.
"""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.convert.planning import speed
from kvfold.convert.planning.plan import ConversionPlan
from kvfold.convert.planning.settings import DTYPE_BYTES
from kvfold.errors import UserError

SEEN = 12
"""How often what sees where attention goes passes through its scores."""
LIBRARIES, DEVICE_LIBRARIES = 700 << 20, 600 << 20
"""Bytes of host and device that a process has before it begins."""
Work = Counter[str]


@dataclass(frozen=True)
class Layer:
    """The sizes that the count needs: of a layer `rest` parameters beside attention, of the model `vocab` rows of `d`."""

    plan: ConversionPlan
    rest: int

    @property
    def attention(self) -> int:
        """Parameters of the source's attention."""
        spec = self.plan.spec
        return spec.hidden_size * spec.head_dim * 2 * (spec.heads + spec.kv_heads)

    def scores(self, tokens: float) -> float:
        """Operations of causal attention on windows."""
        spec, window = self.plan.spec, min(self.plan.settings.window, self.plan.spec.reach)
        return 2 * spec.heads * spec.head_dim * window * tokens

    def forward(self, tokens: float) -> Work:
        return Counter({"float32": 2 * (self.rest + self.attention) * tokens, "attention": self.scores(tokens)})

    def trained(self, tokens: float) -> Work:
        """Forward and back: attention's weights get gradients, all others pass them on."""
        products = (4 * self.rest + 6 * self.attention) * tokens
        return Counter({"healing": products, "attention": 3.5 * self.scores(tokens), "elements": 40 * tokens * self.width})

    @property
    def width(self) -> int:
        return self.plan.spec.hidden_size

    def seen(self, tokens: float) -> Work:
        """What is observed of the layer's inputs: moments, and where attention goes."""
        spec, few = self.plan.spec, min(tokens, 32768)
        window = min(self.plan.settings.window, spec.reach)
        states = 2 * self.width * spec.head_dim * (spec.heads + 2 * spec.kv_heads) * few
        scores = 2 * spec.heads * window * spec.head_dim * few
        moments = 2 * self.width**2 * (tokens + few)
        return Counter({"float64": moments + states + scores, "elements": SEEN * spec.heads * window * few})

    def algebra(self) -> Work:
        """One candidate's."""
        spec, n = self.plan.spec, self.width
        rows = 2 * spec.kv_heads * spec.head_dim
        small = min(rows, n)
        return Counter({"float64": 2 * small * small * max(rows, n) + 8 * rows * n * small / 4, "eigen": small**3})

    def prepared(self) -> Work:
        """What all candidates share: the moment's root, and rows under it."""
        spec, n = self.plan.spec, self.width
        return Counter({"float64": n**3 / 3 + 2 * n * n * spec.head_dim * (spec.heads + 2 * spec.kv_heads)})


def times(work: Work, count: float) -> Work:
    return Counter({kind: count * amount for kind, amount in work.items()})


def steps(plan: ConversionPlan, parameters: int, candidates: int, splits: int) -> dict[str, Work]:
    """Work of every step, all layers together; `parameters` are the source's."""
    spec, settings = plan.spec, plan.settings
    head = spec.vocab_size * spec.hidden_size
    layer = Layer(plan, (parameters - head * (1 if spec.tied else 2)) // spec.layers)
    layer = Layer(plan, layer.rest - layer.attention)
    if settings.calibrate is None:
        return {"folding": times(layer.prepared(), spec.layers)}
    tokens = settings.calibration_tokens
    compared = min(8192, max(2048, tokens // 8))
    found: dict[str, Work] = {}
    if plan.measures_widths:
        few = min(tokens, 16384)
        once = layer.seen(few) + layer.prepared() + layer.forward(few)
        found["measuring widths"] = once + times(layer.algebra() + layer.forward(min(8192, max(2048, few // 8))), splits)
    found["observing"] = layer.seen(tokens) + layer.forward(tokens)
    found["candidates"] = layer.prepared() + times(layer.algebra() + layer.forward(compared), candidates)
    if plan.method in ("kvfold", "pca"):
        wide = spec.heads * spec.head_dim
        fitted = Counter({"float64": 2 * wide * (wide + layer.width) * tokens + wide**3})
        mixed = Counter({"float32": 4 * layer.attention * tokens, "attention": 2 * layer.scores(tokens)})
        found["output projection"] = fitted + mixed
    if settings.heal_steps:
        trained = settings.heal_steps * settings.heal_batch_tokens
        if heals_at_once(plan):
            found["healing"] = layer.trained(trained)
            output = Counter({"healing": 6 * head * trained, "elements": 8 * spec.vocab_size * trained})
            found["healing"] += times(output, 1 / spec.layers)
        else:
            ahead = settings.heal_window if isinstance(settings.heal_window, int) else min(2, spec.layers)
            found["healing"] = times(layer.trained(trained), ahead) + layer.forward(tokens)
    return {name: times(work, spec.layers) for name, work in found.items()}


def heals_at_once(plan: ConversionPlan) -> bool:
    """Whether all layers are healed together where memory allows."""
    window = plan.settings.heal_window
    return window == "all" or (window == "auto" and plan.spec.layers > 8)


def memory(plan: ConversionPlan, parameters: int, dtype: str) -> dict[str, int]:
    """Bytes: `working` for a layer and `healing`, on the device; the hidden `states` in the host's memory, or on the disk where
    that is short; on the `disk` the result in `dtype`, and beside it `scratch` while healing.
    """
    spec, settings = plan.spec, plan.settings
    hidden, head = spec.hidden_size, spec.vocab_size * spec.hidden_size
    body = parameters - head * (1 if spec.tied else 2)
    layer, attention = body // spec.layers, hidden * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    written = DTYPE_BYTES[dtype] * (parameters - plan.parameters_saved)
    if settings.calibrate is None:
        working = 40 * attention
        return {"working": working, "states": 0, "healing": 0, "disk": written, "scratch": 0}
    rows = spec.head_dim * (spec.heads + 2 * spec.kv_heads)
    algebra = 8 * (4 * (hidden + 1) ** 2 + 4 * hidden * rows) + 16 * attention
    forward = 4 * min(8192, settings.calibration_tokens) * (6 * hidden + 3 * (layer - attention) // hidden)
    working = max(4 * layer + algebra + forward, 4 * head)
    states = 4 * settings.calibration_tokens * hidden
    healing, kept = 0, 0
    if settings.heal_steps and heals_at_once(plan):
        scores = 5 * spec.heads * min(settings.window, spec.reach)
        healing = 4 * (body + head + 3 * spec.layers * attention) + 2 * 2048 * spec.layers * (40 * hidden + scores)
        kept = 4 * 5 * spec.layers * attention
    elif settings.heal_steps:
        states, healing = 2 * states, 2 * 4 * (layer + 3 * attention)
    return {"working": working, "states": states, "healing": healing, "disk": written, "scratch": kept}


def peak_of(parts: dict[str, int]) -> int:
    """Bytes that the host has at most where it is the device, too: a layer's work, or healing, beside the hidden states."""
    return LIBRARIES + parts["states"] + max(parts["working"], parts["healing"])


def estimate(plan: ConversionPlan, parameters: int, dtype: str, device_flops: float | None = None) -> dict[str, Any]:
    """What the conversion takes here, after a short test of the device, or on one of so many bfloat16 operations a second: as
    JSON data operations and seconds of each step, bytes, and the speeds that the seconds rest on.

    Raises UserError where `--device` is not here and nothing is said of its speed.
    """
    from kvfold.convert.methods import forms_tried
    from kvfold.convert.pipeline import pick_device

    if device_flops:
        name, rates = f"{device_flops:.3g} operations per second, not measured", speed.stated(device_flops)
    else:
        device = pick_device(plan.settings.device)
        name, rates = f"{device.type}, measured", speed.measured(plan, device)
    found = {
        step: {"operations": round(sum(work.values())), "seconds": sum(n / rates[kind] for kind, n in work.items())}
        for step, work in steps(plan, parameters, *forms_tried(plan)).items()
    }
    total = {key: sum(step[key] for step in found.values()) for key in ("operations", "seconds")}
    return {"device": name, "steps": found, **total, "bytes": memory(plan, parameters, dtype), "operations_per_second": rates}


def refuse_too_little(plan: ConversionPlan, parameters: int, dtype: str, out: Path, free: int) -> None:
    """Raise UserError when the result does not fit on the disk, or a layer's work not into `free` bytes of memory."""
    needed, disk = memory(plan, parameters, dtype), shutil.disk_usage(existing(out)).free
    if needed["disk"] > disk:
        raise UserError(
            f"{out.parent} has {disk:,} bytes free and {out.name} needs about {needed['disk']:,}: free some, or write elsewhere"
        )
    if needed["working"] > free:
        raise UserError(
            f"folding a layer takes about {needed['working'] / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free: "
            "end other programs, or convert on a larger machine"
        )


def existing(path: Path) -> Path:
    """The nearest folder above that there is."""
    return next(parent for parent in path.absolute().parents if parent.exists())
