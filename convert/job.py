"""One conversion's plan, reader and writer, and what is done with them to one layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.convert.checkpoint import CheckpointReader, CheckpointWriter
from kvfold.convert.layouts import Layout, layout_of
from kvfold.convert.plan import ConversionPlan
from kvfold.surgery import baselines, factorized, grouping, latent, rebuilt
from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.designs import FoldedWeights
from kvfold.surgery.latent import Choice, Queried, Tries
from kvfold.surgery.rope import Rope

Report = Callable[[float, str], None]
"""Called with the share of the work that is done and a line on what is going on."""


@dataclass(frozen=True)
class Job:
    """Attributes: the plan, the source's reader and the target's writer."""

    plan: ConversionPlan
    reader: CheckpointReader
    writer: CheckpointWriter

    @property
    def layers(self) -> int:
        return self.plan.spec.layers

    @property
    def layout(self) -> Layout:
        return layout_of(self.plan)

    def read(self, layer: int, unread: tuple[str, ...] = ()) -> AttentionWeights:
        """The source's attention, in the checkpoint's dtype.

        The roles `unread` come as meta tensors, shapes without numbers; `write` copies them from file to file.

        Raises:
            UserError: a tensor is missing, of the wrong shape, or holds NaN or infinity.
        """
        tensors = {}
        for role, name in self.plan.family.names(layer, self.plan.spec).items():
            entry = self.reader.entry(name)
            meta = role in unread
            tensors[role] = torch.empty(entry.shape, device="meta") if meta else self.reader.tensor(name)
        return self.plan.family.lift(tensors, self.plan.spec)

    def alone(self, weights: AttentionWeights, layer: int) -> tuple[str, AttentionWeights]:
        """Fold a layer from its weights: a label and the result."""
        ordered, generator = self._grouped(weights, layer, None)
        return next(grouping.candidates(self.plan.method, ordered, self.plan.kv_heads, None, generator))

    def best(
        self,
        weights: AttentionWeights,
        layer: int,
        moment: Tensor,
        sample: Tensor,
        rope: Rope,
        measure: Callable[[FoldedWeights], float],
    ) -> tuple[float, str, FoldedWeights]:
        """What the method offers for this layer that `measure` finds least wrong: its error, a label, and the weights.

        `sample` (B, T, d) are inputs of the attention, `rope` their rotary tables.
        """
        plan = self.plan
        if plan.design != "grouped":
            return self._latent(weights, layer, moment, sample, rope, measure)
        ordered, generator = self._grouped(weights, layer, moment)
        offered = grouping.candidates(plan.method, ordered, plan.kv_heads, moment, generator)
        return min(((measure(folded), label, folded) for label, folded in offered), key=lambda entry: entry[0])

    def _latent(
        self,
        weights: AttentionWeights,
        layer: int,
        moment: Tensor,
        sample: Tensor,
        rope: Rope,
        measure: Callable[[FoldedWeights], float],
    ) -> tuple[float, str, FoldedWeights]:
        """The same for the designs whose cache is one latent."""
        plan, (rank, rope_dim) = self.plan, self.plan.layer_widths(layer)

        def thin(folded: Queried) -> Queried:
            q_rank = plan.settings.q_rank
            return folded if q_rank is None else latent.low_rank_queries(folded, q_rank, moment)

        if plan.method in baselines.METHODS:
            offered = baselines.METHODS[plan.method](weights, rank, rope_dim, moment, sample)
            thinned = ((label, thin(folded)) for label, folded in offered)
            return min(((measure(folded), label, folded) for label, folded in thinned), key=lambda entry: entry[0])

        phase = latent.coherence(latent.attention_lags(weights, sample, rope), rope)

        def fold(choice: Choice) -> FoldedWeights:
            if plan.design == "rebuilt-key":
                return thin(rebuilt.rebuilt(weights, rank, moment, choice))
            if plan.design == "reused-key":
                return thin(factorized.mfa_kr(weights, rope_dim, moment, phase, choice))
            absorbed = plan.settings.to == "mla"
            return thin(latent.fold(weights, rank, rope_dim, moment, phase, choice, position_free=absorbed))

        start, tries = self._search()
        error, choice, folded = latent.search(fold, measure, start, tries)
        return error, str(choice), folded

    def _search(self) -> tuple[Choice, Tries]:
        """Where the search for a layer's best choice begins, and what it tries."""
        if self.plan.design == "rebuilt-key":
            return rebuilt.START, rebuilt.TRIED
        if self.plan.settings.to != "mla":
            return factorized.START[self.plan.settings.to], factorized.TRIED[self.plan.settings.to]
        return latent.START, latent.STOCK if self.plan.layout == "deepseek_v3" else latent.FREE

    def _grouped(
        self, weights: AttentionWeights, layer: int, moment: Tensor | None
    ) -> tuple[AttentionWeights, torch.Generator]:
        plan = self.plan
        if plan.grouping == "similar":
            groups = grouping.similar(weights, plan.kv_heads, moment)
        else:
            groups = grouping.neighbours(plan.spec.kv_heads, plan.kv_heads)
        return grouping.permute_heads(weights, groups), torch.Generator().manual_seed(plan.settings.seed * 100_003 + layer)

    def write(self, weights: FoldedWeights, layer: int) -> None:
        for name, tensor in self.layout.tensors(weights, layer, self.plan).items():
            if tensor.is_meta:
                self.writer.copy(name, self.reader)
            else:
                self.writer.write(name, tensor)

    def read_written(self, layer: int) -> FoldedWeights:
        """The folded attention as it was written, rounding included."""
        return self.layout.lift({n: self.writer.read(n) for n in self.layout.names(layer, self.plan)}, self.plan)

    def finished(self, layer: int) -> bool:
        return self.unit(layer) in self.writer.finished

    @staticmethod
    def unit(layer: int) -> str:
        """The layer's name in the journal."""
        return f"layer {layer}"
