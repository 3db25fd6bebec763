"""What a conversion will take: operations by step, seconds on a device, memory and disk. An estimate from the plan alone.

Operations are counted as the loops of convert/ do them, leading terms only: matrix products by dtype, causal attention, n³ of
eigendecompositions, and numbers that are passed through one by one. speed.py says how many of each a device does in a second,
benchmarks/cost.py how far this is off. Reading and writing files is not counted.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvfold.convert.budgets import WIDTH_TOKENS
from kvfold.convert.calibration import ATTENTION_TOKENS, JUDGED, compared, counts_alike, fitted, single
from kvfold.convert.folding import REFITTED
from kvfold.convert.heal_whole import free_bytes, needed_bytes, worth_and_fits
from kvfold.convert.heal_windows import WINDOW
from kvfold.convert.methods import forms_tried
from kvfold.convert.output.files import refuse_full_disk
from kvfold.convert.planning import speed
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.planning.settings import DTYPE_BYTES
from kvfold.convert.source.stream import forward_tokens
from kvfold.errors import UserError
from kvfold.surgery.lowrank import iterates

SEEN = 8  # times that what sees where attention goes passes through its scores
CARD = 80e9  # bytes of a device that is not here
Work = dict[str, float]


@dataclass(frozen=True)
class Cost:
    """Of a plan whose source has so many `parameters`, on a `device`, cuda or cpu, with so many bytes of `room`.

    Of a layer `attention` parameters are the source's attention's and `rest` the others, of the model `body` all layers' and
    `head` the output embedding's. Work is one layer's where nothing else is said.
    """

    plan: ConversionPlan
    parameters: int
    room: float
    device: str

    @cached_property
    def head(self) -> int:
        return self.plan.spec.vocab_size * self.plan.spec.hidden_size

    @cached_property
    def body(self) -> int:
        return self.parameters - self.head * (1 if self.plan.spec.tied else 2)

    @cached_property
    def attention(self) -> int:
        spec = self.plan.spec
        return spec.hidden_size * spec.head_dim * 2 * (spec.heads + spec.kv_heads)

    @cached_property
    def rest(self) -> int:
        return self.body // self.plan.spec.layers - self.attention

    @cached_property
    def window(self) -> int:
        return min(self.plan.settings.window, self.plan.spec.max_positions)

    @cached_property
    def folds(self) -> str:
        """In which products a layer is folded."""
        spec = self.plan.spec
        return "float32" if single(self.device, spec.hidden_size, spec.qkv_bias or spec.o_bias) else "float64"

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Latent and shared key of a layer that becomes latent attention, else nothing."""
        plan = self.plan
        return plan.layer_widths(plan.folded[0]) if plan.folded and plan.design != "grouped" else (0, 0)

    @cached_property
    def width(self) -> int:
        """Of a folded head's queries or values, whichever are wider."""
        head_dim, position_free = self.plan.spec.head_dim, self.plan.design == "latent" and self.plan.settings.to == "mla"
        return max(head_dim, (head_dim if position_free else 0) + self.widths[1])

    def mixed(self, tokens: float, width: int | None = None, share: int = 1) -> Work:
        """Attention alone on windows, of queries so wide, by one in `share` tokens; what is masked is worked out, too."""
        spec, width, asking = self.plan.spec, width or self.plan.spec.head_dim, tokens / share
        values = spec.head_dim if self.device == "cpu" else width  # a fused kernel takes one width only
        both = 2 * spec.hidden_size * spec.head_dim
        passes = (12 * spec.heads * asking + 8 * spec.kv_heads * tokens) * width  # they are turned, and brought side by side
        return {
            "stream": 2 * both * (spec.heads * asking + spec.kv_heads * tokens),
            "attention": 2 * spec.heads * (width + values) * self.window * asking,
            "elements": passes,
        }

    def forward(self, tokens: float) -> Work:
        """A layer, without gradients."""
        hidden = self.plan.spec.hidden_size
        passes = 16 * hidden + 5 * self.rest // (3 * hidden)  # norms and residuals, and the MLP's gate
        return total(self.mixed(tokens), {"stream": 2 * self.rest * tokens, "elements": passes * tokens})

    def trained(self, tokens: float) -> Work:
        """Forward and back: attention's weights get gradients, all others pass them on."""
        scores, products = 3 * self.mixed(tokens)["attention"], (4 * self.rest + 6 * self.attention) * tokens
        return {"healing": products, "attention": scores, "elements": 40 * tokens * self.plan.spec.hidden_size}

    def seen(self, tokens: float) -> Work:
        """What is observed of the layer's inputs: moments, of which half is worked out, and where attention goes."""
        spec, few = self.plan.spec, min(tokens, ATTENTION_TOKENS)
        states = 2 * spec.hidden_size * spec.head_dim * (spec.heads + spec.kv_heads) * few
        scores = 2 * spec.heads * self.window * spec.head_dim * few
        moments: Work = {self.folds: (2 if counts_alike(self.plan) else 1) * spec.hidden_size**2 * tokens}
        passes = 8 * spec.hidden_size * tokens + SEEN * spec.heads * self.window * few
        return total(moments, {"stream": states + scores, "elements": passes})

    def prepared(self) -> Work:
        """What all candidates share: the moment's root, and rows under it."""
        spec, n = self.plan.spec, self.plan.spec.hidden_size
        rows = spec.head_dim * (spec.heads + 2 * spec.kv_heads)
        return total({"float64": n**3 / 3}, {self.folds: n * n * rows})

    def algebra(self) -> Work:
        """One candidate's: a Gram matrix, its leading directions, and what they make of the rows."""
        spec, n = self.plan.spec, self.plan.spec.hidden_size
        rows = 2 * spec.kv_heads * spec.head_dim
        small, rank = min(rows, n), sum(self.widths) or spec.head_dim
        products = small * small * max(rows, n) + 2 * rows * n * rank
        if iterates(small, rank):
            return {self.folds: products + 20 * small * small * rank}
        return {self.folds: products, "eigen": small**3}

    def steps(self, candidates: int, splits: int) -> dict[str, Work]:
        """Work of every step, all layers together."""
        spec, settings, tokens = self.plan.spec, self.plan.settings, self.plan.settings.calibration_tokens
        if settings.calibrate is None:
            return {"folding": times(spec.layers, self.prepared())}
        found: dict[str, Work] = {}
        if self.plan.measures_widths:
            few = min(tokens, WIDTH_TOKENS)
            split = times(splits, self.algebra(), self.forward(compared(few) / JUDGED))
            found["measuring widths"] = total(self.seen(few), self.prepared(), self.forward(few), split)
        found["observing"] = total(self.seen(tokens), self.forward(tokens))
        tried = times(candidates, self.algebra(), self.mixed(compared(tokens), self.width, JUDGED))
        found["candidates"] = total(self.prepared(), tried, self.forward(3 * compared(tokens) / JUDGED))
        if self.plan.method in REFITTED:
            wide = spec.heads * spec.head_dim
            share = fitted(tokens, wide)
            asking, kind = tokens / share, "float32" if self.device == "cpu" else "float64"
            added: Work = {kind: wide * (wide + 2 * spec.hidden_size) * asking, "elements": 8 * wide * asking}
            mixed = self.mixed(tokens, self.width, share)
            found["output projection"] = total(added, {"float64": wide**3 / 3}, mixed)
        if settings.heal_steps:
            trained = settings.heal_steps * settings.heal_batch_tokens
            if self.at_once:
                output: Work = {"healing": 6 * self.head * trained, "elements": 8 * spec.vocab_size * trained}
                found["healing"] = total(
                    self.forward(settings.more_tokens), self.trained(trained), times(1 / spec.layers, output)
                )
            else:
                found["healing"] = total(times(self.ahead, self.trained(trained)), self.forward(tokens))
        return {name: times(spec.layers, work) for name, work in found.items()}

    @cached_property
    def ahead(self) -> int:
        asked = self.plan.settings.heal_window
        return min(asked if isinstance(asked, int) else WINDOW, self.plan.spec.layers)

    @property
    def weights(self) -> int:
        """What healing all layers at once has in memory: both embeddings, also where they are tied."""
        return self.body + 2 * self.head

    @cached_property
    def at_once(self) -> bool:
        """Whether all layers are healed together, as it is asked for or as `heal_window auto` decides."""
        asked = self.plan.settings.heal_window
        return asked == "all" or (asked == "auto" and worth_and_fits(self.plan, self.weights, self.window, self.room))

    def memory(self, dtype: str) -> dict[str, int]:
        """Bytes: `working` for a layer and `healing`, on the device; the hidden `states` in the host's memory, or on the disk
        where that is short; on the `disk` the result in `dtype`, and beside it `scratch` while healing."""
        spec, settings, hidden = self.plan.spec, self.plan.settings, self.plan.spec.hidden_size
        layer, tokens = self.attention + self.rest, settings.calibration_tokens
        found = {"disk": DTYPE_BYTES[dtype] * (self.parameters - self.plan.parameters_saved)}
        if settings.calibrate is None:
            return {"working": 8 * self.attention, **found}
        rows = spec.head_dim * (spec.heads + 2 * spec.kv_heads)
        algebra = 8 * (4 * hidden * (hidden + rows)) + 16 * self.attention
        passing = 4 * min(forward_tokens(self.device, hidden), tokens) * (6 * hidden + self.rest // hidden)
        found |= {"working": max(4 * layer + algebra + passing, 4 * self.head), "states": 4 * tokens * hidden}
        if settings.heal_steps and self.at_once:
            found |= {
                "healing": needed_bytes(self.plan, self.weights, self.window),
                "scratch": 4 * 5 * spec.layers * self.attention,
                "states": 4 * (tokens + settings.more_tokens) * hidden,
            }
        elif settings.heal_steps:
            found |= {"states": 2 * 4 * tokens * hidden, "healing": self.ahead * 4 * (layer + 3 * self.attention)}
        return found


def total(*works: Work) -> Work:
    return {kind: sum(work.get(kind, 0.0) for work in works) for kind in dict.fromkeys(k for work in works for k in work)}


def times(count: float, *works: Work) -> Work:
    return {kind: count * amount for kind, amount in total(*works).items()}


def estimate(plan: ConversionPlan, parameters: int, dtype: str, device_flops: float | None = None) -> dict[str, Any]:
    """What the conversion takes here, after a short test of the device, or on one of so many bfloat16 operations a second: as
    JSON data operations and seconds of each step, bytes, and the speeds that the seconds rest on.

    Raises UserError where `--device` is not here and nothing is said of its speed.
    """
    from kvfold.convert.pipeline import pick_device

    if device_flops:
        kind, name = "cuda", f"{device_flops:.3g} operations per second, not measured"
        rates, room = speed.stated(device_flops), CARD
    else:
        device = pick_device(plan.settings.device)
        kind, name = device.type, f"{device.type}, measured"
        rates, room = speed.measured(plan, device), float(free_bytes(device))
    cost = Cost(plan, parameters, room, kind)
    found = {
        step: {"operations": round(sum(work.values())), "seconds": sum(n / rates[kind] for kind, n in work.items())}
        for step, work in cost.steps(*forms_tried(plan)).items()
    }
    whole = {key: sum(step[key] for step in found.values()) for key in ("operations", "seconds")}
    return {"device": name, "steps": found, **whole, "bytes": cost.memory(dtype), "operations_per_second": rates}


def refuse_too_little(plan: ConversionPlan, parameters: int, dtype: str, out: Path, free: int, device: str) -> None:
    """Raise UserError when the result does not fit on the disk, or most of a layer's work not into `free` bytes of memory."""
    needed = Cost(plan, parameters, free, device).memory(dtype)
    refuse_full_disk(out, needed["disk"], "about ")
    if 0.7 * needed["working"] > free:
        sizes = f"{needed['working'] / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
        raise UserError(f"folding a layer takes about {sizes}: end other programs, or convert on a larger machine")
