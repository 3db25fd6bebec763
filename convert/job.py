"""One conversion's plan, reader and writer, and what is done with them to one layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.convert.checkpoint import CheckpointReader, CheckpointWriter
from kvfold.convert.layouts import source as source_layout
from kvfold.convert.plan import ConversionPlan
from kvfold.surgery import grouping
from kvfold.surgery.attention import AttentionWeights

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

    def names(self, layer: int) -> dict[str, str]:
        """Role → tensor name of the layer's attention."""
        return self.plan.family.names(layer, self.plan.spec)

    def read(self, layer: int, unread: tuple[str, ...] = ()) -> AttentionWeights:
        """The source's attention, in the checkpoint's dtype.

        The roles `unread` come as meta tensors, shapes without numbers; `write` copies them from file to file.

        Raises:
            UserError: a tensor is missing, of the wrong shape, or holds NaN or infinity.
        """
        tensors = {}
        for role, name in self.names(layer).items():
            entry = self.reader.entry(name)
            meta = role in unread
            tensors[role] = torch.empty(entry.shape, device="meta") if meta else self.reader.tensor(name)
        return self.plan.family.lift(tensors, self.plan.spec)

    def candidates(
        self, weights: AttentionWeights, layer: int, moment: Tensor | None
    ) -> Iterator[tuple[str, AttentionWeights]]:
        """What the method offers for this layer, each with a label."""
        plan = self.plan
        generator = torch.Generator().manual_seed(plan.settings.seed * 100_003 + layer)
        if plan.grouping == "similar":
            groups = grouping.similar(weights, plan.kv_heads, moment)
        else:
            groups = grouping.neighbours(plan.spec.kv_heads, plan.kv_heads)
        ordered = grouping.permute_heads(weights, groups)
        yield from grouping.candidates(plan.method, ordered, plan.kv_heads, moment, generator)

    def stored(self, weights: AttentionWeights, layer: int) -> dict[str, Tensor]:
        """A folded layer as the checkpoint holds it, by tensor name."""
        return source_layout.tensors(weights, self.names(layer))

    def lift(self, tensors: dict[str, Tensor], layer: int) -> AttentionWeights:
        """The inverse of `stored`."""
        spec = replace(self.plan.spec, kv_heads=self.plan.kv_heads)
        return self.plan.family.lift({role: tensors[name] for role, name in self.names(layer).items()}, spec)

    def write(self, weights: AttentionWeights, layer: int) -> None:
        for name, tensor in self.stored(weights, layer).items():
            if tensor.is_meta:
                self.writer.copy(name, self.reader)
            else:
                self.writer.write(name, tensor)

    def read_written(self, layer: int) -> AttentionWeights:
        """The folded attention as it was written, rounding included."""
        return self.lift({name: self.writer.read(name) for name in self.names(layer).values()}, layer)

    def finished(self, layer: int) -> bool:
        return self.unit(layer) in self.writer.finished

    @staticmethod
    def unit(layer: int) -> str:
        """The layer's name in the journal."""
        return f"layer {layer}"
