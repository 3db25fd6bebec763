"""A source layer: its attention as tensors, and what the calibration tokens show of it."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from kvfold.convert import processes
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.stream import Block, HiddenStates, SourceModel, check_finite
from kvfold.surgery import baselines, latent, norms
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
FITTED = 48
"""Tokens, about, for each number of the heads on which the output projection is fitted where there are more."""
JUDGED = 2
"""Of the tokens that candidates are compared on, one in so many is looked at behind the attention, and of their windows one in
so many behind the whole layer."""
SINGLE = 2048
"""Hidden size from which on a CPU folds in float32."""


def single(device: str, hidden: int, biased: bool) -> bool:
    """Whether layers of this hidden size are folded in float32, their moments too. What it rounds off of wide layers is far
    below what a fold leaves out, but where attention has biases, beside which keys may be small; products of a GPU may be
    TF32."""
    return device == "cpu" and hidden >= SINGLE and not biased


def _dtype(block: Block, hidden: int) -> torch.dtype:
    """In which a layer is folded."""
    return torch.float32 if single(block.device.type, hidden, block.biased) else torch.float64


def fitted(tokens: int, numbers: int) -> int:
    """Of so many calibration tokens, one in how many the output projection is fitted on, which reads so many `numbers`."""
    return max(1, tokens // (FITTED * numbers))


def in_turn(windows: Tensor, share: int) -> Iterator[tuple[Tensor | slice, slice]]:
    """Every `share`-th token of windows, given by their numbers among all: which of them, and which of their tokens.

    Windows begin with another token each. Attention is worked out for these tokens alone, and every text still has a say.
    """
    if share == 1:
        yield slice(None), slice(None)
        return
    for first in range(share):
        rows = (windows % share == first).nonzero()[:, 0]
        if len(rows):
            yield rows, slice(first, None, share)


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
class Compared:
    """Windows on which the candidates of a layer are compared, (B, T, d) each: those that this process holds, or those of all.

    Attributes:
        before: hidden states before the layer.
        inputs: what its attention reads.
        given: what it gives.
        after: those behind the layer.
        shared: whether other processes hold more of them, so that errors are means over all; else they are those of all.
    """

    block: Block
    original: HiddenStates
    before: Tensor
    inputs: Tensor
    given: Tensor
    after: Tensor
    tell: Callable[[str], None]
    shared: bool = True

    @torch.no_grad()
    def compare(self, folded: FoldedWeights) -> float:
        """The relative error behind the attention with other weights in its place."""
        attention = design(folded.to(self.block.device, torch.float32))

        def made(batch: slice) -> Iterator[tuple[Tensor, Tensor]]:
            for rows, asking in in_turn(self.numbers[batch], JUDGED):
                before, given = (states[batch][rows, asking] for states in (self.before, self.given))
                mixed = attention.o_proj(self.block.mix(attention, self.inputs[batch][rows], asking))
                yield before + mixed, before + given

        return self._error(made)

    @torch.no_grad()
    def measure(self, folded: FoldedWeights) -> float:
        """The same behind the whole layer."""

        def made(batch: slice) -> Iterator[tuple[Tensor, Tensor]]:
            rows = self.numbers[batch] % JUDGED == 0
            if rows.any():
                yield self.block(self.before[batch][rows]), self.after[batch][rows]

        with self.block.attention(design(folded.to(self.block.device, torch.float32))):
            return self._error(made)

    @property
    def numbers(self) -> Tensor:
        """Those of the windows among all."""
        return processes.numbers(len(self.before)) if self.shared else torch.arange(len(self.before))

    def of_all(self) -> "Compared":
        """Those of all processes, on each of them, in the order in which one process would have them."""
        held = (self.before, self.inputs, self.given, self.after)
        before, inputs, given, after = (processes.of_all(rows.float().cpu()).to(self.block.device) for rows in held)
        return replace(self, before=before, inputs=inputs, given=given, after=after, shared=False)

    def _error(self, made: Callable[[slice], Iterable[tuple[Tensor, Tensor]]]) -> float:
        """The relative error of outputs, beside what they should be (..., d), that are `made` of as many windows as fit."""

        def summed() -> tuple[Tensor | float, int]:
            error: Tensor | float = 0.0
            tokens = 0
            for batch in self.original.batches(0, len(self.before)):
                for output, target in made(batch):
                    count = target.shape[:-1].numel()
                    error, tokens = error + relative_error(output, target) * count, tokens + count
            return error, tokens

        with self.block.quickly(self.before):
            total, tokens = self.original.with_less(summed, self.tell)
        mean = float(total) / max(1, tokens)
        error = processes.mean(mean, tokens) if self.shared else mean
        return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Observed:
    """A source layer and what was seen of it on the calibration tokens.

    Attributes:
        plan: what the layer is folded into.
        attention: the source's, in the checkpoint's dtype.
        plain: E[z zᵀ] of the attention's augmented inputs (d + 1, d + 1), all tokens alike; None where nothing reads it.
        attended: the same where tokens count by the attention that they receive, with a share of the plain one.
        phase: what each head's attention leaves of every frequency on average, (H, D/2) complex.
        windows: those on which its candidates are compared.
        inconstancy: how far the inputs of the sample are from one in the direction in which the others are most nearly so, root
            mean square; in that of all where there are no others.
    """

    plan: ConversionPlan
    attention: AttentionWeights
    plain: Tensor | None
    attended: Tensor
    phase: Tensor
    windows: Compared
    inconstancy: Callable[[], float]

    @property
    def sample(self) -> Tensor:
        """Some of the attention's inputs (B, T, d)."""
        return self.windows.inputs

    @property
    def passed(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `Block.passed` made of the first windows."""
        return self.windows.inputs, self.windows.given, self.windows.after

    def compare(self, folded: FoldedWeights) -> float:
        """The relative error behind the attention with other weights in its place."""
        return self.windows.compare(folded)

    def measure(self, folded: FoldedWeights) -> float:
        """The same behind the whole layer, which takes several times as long."""
        return self.windows.measure(folded)

    def alone(self) -> "Observed":
        """The same with the windows of all processes, which must all ask for it: what it measures, it measures by itself."""
        return replace(self, windows=self.windows.of_all()) if self.windows.shared and processes.count() > 1 else self

    @cached_property
    def weights(self) -> AttentionWeights:
        """The attention in float64."""
        return self.attention.to(torch.float64)

    @property
    def moment(self) -> Tensor:
        """`plain`, where it is there."""
        assert self.plain is not None
        return self.plain

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

    def bare(self, dtype: torch.dtype) -> AttentionWeights:
        """The attention without norms of queries and keys, scores over √D."""
        return self.attention.to(dtype).rooted() if self.linear is None else self.linear.weights.to(dtype)

    @cached_property
    def layer(self) -> Layer:
        """What the designs whose cache is one latent are folded from, at whatever widths."""
        weights = self.bare(_dtype(self.windows.block, self.sample.shape[-1]))
        return Layer(weights, self.attended, self.phase.to(torch.promote_types(weights.k.dtype, torch.complex64)))

    def forget(self) -> None:
        """Let go of what only candidates are made of, which is as large as the layer."""
        for name in ("layer", "weights", "linear"):
            self.__dict__.pop(name, None)


def observe(
    plan: ConversionPlan, source: SourceModel, layer: int, block: Block, original: HiddenStates, tell: Callable[[str], None]
) -> Observed:
    """Read a layer's attention and run it over its inputs. The original stream stays before the layer."""
    attention = read_attention(plan, source.reader, layer).to(source.device)
    rope, tokens = block.rope, original.data.shape[1]
    received, lags = original.with_less(lambda: _attention(attention, block, original), tell)
    alike = torch.ones_like(received) if original.weights is None else original.weights.to(received)
    shares, lags = processes.total(torch.stack([received.sum(), alike.sum()]), lags)
    mixed = ATTENDED * received / shares[0] + (1 - ATTENDED) * alike / shares[1]
    attended = original.with_less(lambda: _moment(block, original, mixed), tell)
    plain = original.with_less(lambda: _moment(block, original, alike), tell) if counts_alike(plan) else None
    # The stream moves on in place. A process may hold no window of those that are compared.
    before = original.first(max(1, compared(original.studied * tokens) // tokens)).clone().to(source.device)
    inputs = given = after = before

    def passed() -> list[Tensor]:
        pieces = [block.passed(before[rows]) for rows in original.batches(0, len(before))]
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    with torch.no_grad(), block.quickly(before):
        if len(before):
            inputs, given, after = original.with_less(passed, tell)
    windows = Compared(block, original, before, inputs, given, after, tell)
    check_finite(after, f"source layer {layer}")

    def inconstancy() -> float:
        sampled = SecondMoment(inputs.shape[-1], source.device)
        sampled.add(inputs, None if original.weights is None else original.weights[: len(inputs)])
        (total,) = processes.total(sampled.total)
        assert plain is not None
        others = plain.total - total
        found = others if others[-1, -1] > 1e-6 * total[-1, -1] else total
        return off_one(constant_direction(found / found[-1, -1]), total / total[-1, -1])

    phase = latent.coherence(lags, rope)
    phase = phase if plan.spec.turning[layer] else torch.ones_like(phase)
    return Observed(
        plan,
        attention,
        None if plain is None else plain.value(),
        attended.value(),
        phase,
        windows,
        inconstancy,
    )


def _attention(attention: AttentionWeights, block: Block, original: HiddenStates) -> tuple[Tensor, Tensor]:
    """Of the studied windows that this process holds, how much attention each token receives (rows, T), none in windows that
    are not looked at, and how much attention goes how far (H, T)."""
    rows, tokens = processes.held(original.studied), original.data.shape[1]
    received = torch.zeros(rows, tokens, dtype=torch.float64, device=block.device)
    lags = torch.zeros(attention.heads, tokens, device=block.device)
    for batch in original.batches(0, min(rows, processes.held(-(-ATTENTION_TOKENS // tokens)))):
        x = block.attention_input(original.data[batch].to(block.device))
        with block.quickly(x):
            seen, found = latent.attention_seen(attention, x, block.rope, block.visible)
        received[batch] = found.to(received)
        lags += seen
    return received if original.weights is None else received * original.weights.to(received), lags


def _moment(block: Block, original: HiddenStates, counts: Tensor) -> SecondMoment:
    """The second moment of the attention's inputs over the studied windows of all processes, each token counted as often as
    `counts` (rows, T) of this one's say."""
    hidden = original.data.shape[-1]
    found = SecondMoment(hidden, block.device, _dtype(block, hidden))
    for batch in original.batches(0, len(counts)):
        found.add(block.attention_input(original.data[batch].to(block.device)), counts[batch])
    (found.total,) = processes.total(found.total)
    return found


def counts_alike(plan: ConversionPlan) -> bool:
    """Whether something reads the second moment to which all tokens contribute alike."""
    published = plan.design == "grouped" or plan.method in baselines.METHODS
    return published or bool(plan.spec.key_norm) or plan.q_rank is not None or plan.settings.biases == "regressed"


@torch.no_grad()
def refit_output(folded: Folded, seen: Observed, bias: bool) -> Folded:
    """`folded` with the output projection that brings it nearest to the source's attention on the calibration tokens.

    The block still has the source's attention, and the original stream moves behind it.
    """
    block, original = seen.windows.block, seen.windows.original
    attention = design(folded.to(block.device, torch.float32))
    regression = OutputRegression(attention.o_proj.in_features, attention.o_proj.out_features, block.device)
    windows = processes.numbers(len(original.data))
    share = fitted(original.studied * original.data.shape[1], attention.o_proj.in_features)

    def watch(batch: slice, hidden: Tensor, x: Tensor, wanted: Tensor) -> None:
        for rows, asking in in_turn(windows[batch], share):
            there = wanted[rows, asking]
            with block.quickly(hidden):
                heads = block.mix(attention, x[rows], asking)
                missing = there - attention.o_proj(heads)
            regression.add(heads, missing, (hidden[rows, asking] + there).square().sum(-1))

    block.advance(original, watch, seen.windows.tell, seen.passed)
    regression.gram, regression.cross = processes.total(regression.gram, regression.cross)
    return regression.solve(folded, bias)
