"""A source layer: its attention as tensors, and what the calibration tokens show of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvfold.convert.checkpoint import CheckpointReader
from kvfold.convert.plan import ConversionPlan
from kvfold.convert.stream import Block, HiddenStates, SourceModel, check_finite
from kvfold.surgery import latent
from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.designs import FoldedWeights, design
from kvfold.surgery.healing import relative_error
from kvfold.surgery.lowrank import SecondMoment
from kvfold.surgery.rope import Rope

MEASURED_TOKENS = (2048, 8192)
"""Calibration tokens on which the candidates of a layer are compared: an eighth of all, between these two."""


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
        weights: its attention, float64.
        moment: E[z zᵀ] of the attention's augmented inputs (d + 1, d + 1).
        sample, rope: some of the inputs (B, T, d), and their rotary tables.
        measure: the relative error behind the layer with other weights in its attention's place.
    """

    weights: AttentionWeights
    moment: Tensor
    sample: Tensor
    rope: Rope
    measure: Callable[[FoldedWeights], float]

    @cached_property
    def phase(self) -> Tensor:
        """What each head's attention leaves of every frequency on average, (H, D/2) complex."""
        return latent.coherence(latent.attention_lags(self.weights, self.sample, self.rope), self.rope)


def observe(plan: ConversionPlan, source: SourceModel, layer: int, block: Block, original: HiddenStates) -> Observed:
    """Read a layer's attention, take its inputs' second moment, and move the original stream behind the layer."""
    attention = read_attention(plan, source.reader, layer).to(source.device, torch.float64)
    moment = SecondMoment(plan.spec.hidden_size, source.device)
    for rows in original.batches():
        weights = None if original.weights is None else original.weights[rows].to(source.device)
        moment.add(block.attention_input(original.data[rows].to(source.device)), weights)
    windows, tokens, _ = original.data.shape
    least, most = MEASURED_TOKENS
    measured = slice(0, max(1, min(most, max(least, windows * tokens // 8)) // tokens))
    before = original.data[measured].clone().to(source.device)  # the stream moves on in place
    with torch.no_grad():
        inputs = block.attention_input(before)
    block.advance(original)
    after = original.data[measured].to(source.device)
    check_finite(original.data, f"source layer {layer}")

    @torch.no_grad()
    def measure(folded: FoldedWeights) -> float:
        block.set_attention(design(folded.to(source.device, torch.float32)))
        error = float(relative_error(block(before), after))
        return error if math.isfinite(error) else math.inf

    cos, sin = block.rope
    return Observed(attention, moment.value(), inputs, (cos[0], sin[0]), measure)
