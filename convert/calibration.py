"""A source layer: its attention as tensors, and what the calibration tokens show of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from kvfold.convert import processes
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.stream import Block, HiddenStates, SourceModel, check_finite
from kvfold.surgery import latent, norms
from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.constant import constant_direction, off_one
from kvfold.surgery.designs import FoldedWeights, design
from kvfold.surgery.healing import relative_error
from kvfold.surgery.layer import Layer
from kvfold.surgery.lowrank import SecondMoment
from kvfold.surgery.refit import OutputRegression

Folded = TypeVar("Folded", bound=FoldedWeights)
ATTENDED = 0.9
"""How much of a second moment counts tokens by the attention they receive; the rest counts them alike."""
ATTENTION_TOKENS = 32768
"""Calibration tokens, about, on which it is seen where attention goes."""
MEASURED_TOKENS = (2048, 8192)
"""Calibration tokens on which the candidates of a layer are compared: an eighth of all, between these two."""


def compared(tokens: int) -> int:
    """How many of so many calibration tokens the candidates of a layer are compared on."""
    least, most = MEASURED_TOKENS
    return min(most, max(least, tokens // 8))


def read_attention(
    plan: ConversionPlan, reader: CheckpointReader, layer: int, unread: tuple[str, ...] = ()
) -> AttentionWeights:
    """The source's attention, in the checkpoint's dtype; the roles `unread` as meta tensors, shapes without numbers.

    Raises:
        UserError: a tensor is missing, of the wrong shape, or holds NaN or infinity.
    """
    tensors = {}
    for role, name in plan.family.names(layer, plan.spec).items():
        tensors[role] = reader.tensor(name, meta=role in unread)
    return plan.family.lift(tensors, plan.spec)


@dataclass(frozen=True)
class Observed:
    """A source layer and what was seen of it on the calibration tokens.

    Attributes:
        plan: what the layer is folded into.
        weights: its attention, float64.
        moment: E[z zᵀ] of the attention's augmented inputs (d + 1, d + 1), all tokens alike.
        attended: the same where tokens count by the attention that they receive, with a share of the plain one.
        phase: what each head's attention leaves of every frequency on average, (H, D/2) complex.
        sample: some of the inputs (B, T, d), those that this process holds.
        compare: the relative error behind the attention with other weights in its place.
        measure: the same behind the whole layer, which takes several times as long.
        inconstancy: how far the inputs of the sample are from one in the direction in which the others are most nearly so, root
            mean square; in that of all where there are no others.
    """

    plan: ConversionPlan
    weights: AttentionWeights
    moment: Tensor
    attended: Tensor
    phase: Tensor
    sample: Tensor
    compare: Callable[[FoldedWeights], float]
    measure: Callable[[FoldedWeights], float]
    inconstancy: Callable[[], float]

    @cached_property
    def linear(self) -> norms.Linear | None:
        """The layer without its norms of queries and keys, None where it has none."""
        if not self.plan.spec.key_norm:
            return None
        sized = self.plan.settings.key_norm == "cached"
        return norms.Linear(self.weights.rooted(), self.moment, self.plan.design == "rebuilt-key", sized)

    @cached_property
    def constant(self) -> Tensor:
        """The direction (d,) in which the inputs are most nearly one. Weighing tokens by the attention that they receive leaves
        less to tell it from, and fits other text worse."""
        return constant_direction(self.moment)

    @cached_property
    def layer(self) -> Layer:
        """What the designs whose cache is one latent are folded from, at whatever widths."""
        weights = self.weights.rooted() if self.linear is None else self.linear.weights
        return Layer(weights, self.attended, self.phase.to(torch.complex128))


def observe(
    plan: ConversionPlan, source: SourceModel, layer: int, block: Block, original: HiddenStates, tell: Callable[[str], None]
) -> Observed:
    """Read a layer's attention and run it over its inputs. The original stream stays before the layer."""
    attention = read_attention(plan, source.reader, layer).to(source.device, torch.float64)
    rope, tokens = block.rope, original.data.shape[1]
    plain, attended, lags = original.with_less(lambda: _sums(attention, block, original), tell)
    plain.total, attended.total, lags = processes.total(plain.total, attended.total, lags)
    # The stream moves on in place. A process may hold no window of those that are compared.
    before = original.first(max(1, compared(original.studied * tokens) // tokens)).clone().to(source.device)
    inputs = given = after = before

    def all_of(work: Callable[[slice], Tensor]) -> Tensor:
        """What `work` makes of the windows that are compared, as many at a time as fit."""
        with block.quickly(before):
            return original.with_less(lambda: torch.cat([work(rows) for rows in original.batches(0, len(before))]), tell)

    def passed() -> list[Tensor]:
        pieces = [block.passed(before[rows]) for rows in original.batches(0, len(before))]
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    with torch.no_grad(), block.quickly(before):
        if len(before):
            inputs, given, after = original.with_less(passed, tell)
    behind = before + given
    check_finite(after, f"source layer {layer}")

    def error_of(output: Callable[[slice], Tensor], target: Tensor) -> float:
        error = processes.mean(relative_error(all_of(output), target) if len(target) else 0.0, len(target))
        return error if math.isfinite(error) else math.inf

    @torch.no_grad()
    def compare(folded: FoldedWeights) -> float:
        attention = design(folded.to(source.device, torch.float32))
        return error_of(lambda rows: before[rows] + attention.o_proj(block.mix(attention, inputs[rows])), behind)

    @torch.no_grad()
    def measure(folded: FoldedWeights) -> float:
        with block.attention(design(folded.to(source.device, torch.float32))):
            return error_of(lambda rows: block(before[rows]), after)

    def inconstancy() -> float:
        sampled = SecondMoment(inputs.shape[-1], source.device)
        sampled.add(inputs, None if original.weights is None else original.weights[: len(inputs)])
        (total,) = processes.total(sampled.total)
        others = plain.total - total
        found = others if others[-1, -1] > 1e-6 * total[-1, -1] else total
        return off_one(constant_direction(found / found[-1, -1]), total / total[-1, -1])

    moment = plain.value()
    mixed = ATTENDED * attended.value() + (1 - ATTENDED) * moment
    phase = latent.coherence(lags, rope)
    phase = phase if plan.spec.turning[layer] else torch.ones_like(phase)
    return Observed(plan, attention, moment, mixed, phase, inputs, compare, measure, inconstancy)


def _sums(attention: AttentionWeights, block: Block, original: HiddenStates) -> tuple[SecondMoment, SecondMoment, Tensor]:
    """Of the windows that this process holds: the attention's inputs, all alike and by the attention that they receive, and how
    much attention goes how far, (H, T)."""
    tokens, hidden = original.data.shape[1:]
    plain, attended = (SecondMoment(hidden, block.device) for _ in range(2))
    lags = torch.zeros(attention.heads, tokens, device=block.device)
    looked = processes.held(-(-ATTENTION_TOKENS // tokens))
    for rows in original.batches(0, processes.held(original.studied)):
        counts = None if original.weights is None else original.weights[rows].to(block.device)
        x = block.attention_input(original.data[rows].to(block.device))
        plain.add(x, counts)
        x = x[: max(0, looked - rows.start)]
        if len(x):
            seen, received = latent.attention_seen(attention, x, block.rope, block.visible)
            attended.add(x, received if counts is None else received * counts[: len(x)])
            lags += seen
    return plain, attended, lags


@torch.no_grad()
def refit_output(folded: Folded, block: Block, original: HiddenStates, bias: bool, tell: Callable[[str], None]) -> Folded:
    """`folded` with the output projection that brings it nearest to the source's attention on all calibration tokens.

    The block still has the source's attention, and `original` moves behind it.
    """
    attention = design(folded.to(block.device, torch.float32))
    regression = OutputRegression(attention.o_proj.in_features, attention.o_proj.out_features, block.device)

    def watch(hidden: Tensor, x: Tensor, wanted: Tensor) -> None:
        with block.quickly(hidden):
            heads = block.mix(attention, x)
            missing = wanted - attention.o_proj(heads)
        regression.add(heads, missing, (hidden + wanted).square().sum(-1))

    block.advance(original, watch, tell)
    regression.gram, regression.cross = processes.total(regression.gram, regression.cross)
    return regression.solve(folded, bias)
