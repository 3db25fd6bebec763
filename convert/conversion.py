"""One conversion's plan, reader and writer, and what is done with them to one layer."""

from collections.abc import Callable
from dataclasses import dataclass

from kvfold.convert import processes
from kvfold.convert.calibration import read_attention
from kvfold.convert.layouts import Layout, layout_of
from kvfold.convert.output.writer import CheckpointWriter
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.designs import FoldedWeights

Report = Callable[[float | None, str], None]
"""Called with the share of the work that is done and a line on what is going on; with None for a line that shall stay."""


@dataclass(frozen=True)
class Conversion:
    """Attributes: the plan, the source's reader, the target's writer, and who is told how it goes."""

    plan: ConversionPlan
    reader: CheckpointReader
    writer: CheckpointWriter
    report: Report = lambda share, line: None

    def tell(self, line: str) -> None:
        """Say what shall stay to be read."""
        self.report(None, line)

    @property
    def layers(self) -> int:
        return self.plan.spec.layers

    @property
    def layout(self) -> Layout:
        return layout_of(self.plan)

    def read(self, layer: int, unread: tuple[str, ...] = ()) -> AttentionWeights:
        """`read_attention`; what is unread, `write` copies from file to file."""
        return read_attention(self.plan, self.reader, layer, unread)

    def write(self, weights: FoldedWeights, layer: int) -> None:
        for name, tensor in self.layout.tensors(weights, layer, self.plan).items():
            if tensor.is_meta:
                self.writer.copy(name, self.reader)
            else:
                self.writer.write(name, tensor)

    def read_written(self, layer: int) -> FoldedWeights:
        """The folded attention as it was written, rounding included."""
        return self.layout.lift({n: self.writer.read(n) for n in self.layout.names(layer, self.plan)}, self.plan)

    def shared_written(self, layer: int) -> FoldedWeights:
        """`read_written` for all processes."""
        return processes.from_main(lambda: self.read_written(layer))

    def finished(self, layer: int) -> bool:
        return self.unit(layer) in self.writer.finished

    @staticmethod
    def unit(layer: int) -> str:
        """The layer's name in the journal."""
        return f"layer {layer}"
