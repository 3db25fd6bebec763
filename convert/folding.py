"""One layer folded in closed form on the original stream, and how it is kept for a resume until it is written."""

import json
import math
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kvfold.convert import processes
from kvfold.convert.calibration import observe, refit_output
from kvfold.convert.conversion import Conversion
from kvfold.convert.methods import best
from kvfold.convert.source.fetch import spelled
from kvfold.convert.source.stream import Block, HiddenStates, SourceModel, check_finite
from kvfold.errors import ConversionError
from kvfold.surgery.designs import WEIGHTS, Design, FoldedWeights, design, weights_of

REFITTED = ("kvfold", "pca")
"""Methods whose output projection is fitted to the folded heads; the others are left as they were published."""


@dataclass
class OpenLayer:
    """A layer that has been folded but not written: its block, and the record that kvfold.json will have of it.

    `design` is None in a layer that stays as it is.
    """

    block: Block
    weights: InitVar[FoldedWeights | None]
    record: dict[str, Any] = field(default_factory=dict)
    design: Design | None = field(default=None, init=False)

    def __post_init__(self, weights: FoldedWeights | None) -> None:
        if weights is not None:
            self.set_weights(weights)

    def set_weights(self, weights: FoldedWeights) -> None:
        self.design = design(weights.to(self.block.device, torch.float32))
        self.block.set_attention(self.design)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What learns in it."""
        return [] if self.design is None else list(self.design.parameters())


def designs_of(layers: Iterable[OpenLayer]) -> list[Design]:
    """The designs of those that are folded."""
    return [item.design for item in layers if item.design is not None]


def fold_layer(job: Conversion, source: SourceModel, layer: int, original: HiddenStates) -> OpenLayer:
    """Fold a layer's attention by the candidate of least error, and move the original stream behind it."""
    block = source.block(layer)
    seen = observe(job.plan, source, layer, block, original, job.tell)
    error, label, folded = best(job.plan, seen, layer)
    if error == math.inf:
        raise ConversionError(f"folding layer {layer} gave no finite result: check the source's weights there")
    seen.forget()
    folded = _same(folded)
    if job.plan.method in REFITTED:
        refitted = _same(refit_output(folded, seen, job.plan.layout == "kvfold"))
        refitted_error = seen.measure(refitted)
        if refitted_error < error:
            error, folded = refitted_error, refitted
    else:
        block.advance(original, known=seen.passed)
    record = {"choice": label, "block_error": error}
    if job.plan.settings.biases == "regressed":
        record["inconstancy"] = seen.inconstancy()
    check_finite(original.data, f"source layer {layer}")
    return OpenLayer(block, folded, record)


def _same(folded: FoldedWeights) -> FoldedWeights:
    """The main process's: eigenvectors are free in sign, and need not come out alike on different machines."""
    return folded.each(processes.same)


def reopen_layer(
    source: SourceModel,
    layer: int,
    original: HiddenStates,
    weights: FoldedWeights | None = None,
    record: dict[str, Any] | None = None,
) -> OpenLayer:
    """A layer that was folded before an interruption, or that stays as it is; the original stream moves behind it."""
    block = source.block(layer)
    block.advance(original)
    return OpenLayer(block, weights, record or {})


def packed(items: Iterable[tuple[int, OpenLayer]]) -> bytes:
    """Layers as they are, unrounded, as a safetensors file."""
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for layer, item in items:
        if item.design is None:
            continue
        held = weights_of(item.design)
        tensors |= {f"{layer}.{name}": t.cpu().contiguous() for name, t in held.tensors().items()}
        notes[str(layer)] = json.dumps([type(held).__name__, item.record])
    return save(tensors, notes or None)  # of no metadata at all, safetensors 0.8 writes a file that it cannot read


def unpacked(file: Path, layer: int) -> tuple[FoldedWeights, dict[str, Any]] | None:
    """What `packed` kept of `layer`, its weights and record; None when it is not there. The main process reads it."""
    return processes.from_main(lambda: _unpacked(file, layer))


def _unpacked(file: Path, layer: int) -> tuple[FoldedWeights, dict[str, Any]] | None:
    if not file.exists():
        return None
    with safe_open(spelled(file.parent) / file.name, "pt") as saved:
        notes = saved.metadata() or {}
        if str(layer) not in notes:
            return None
        mine = [name for name in saved.keys() if name.startswith(f"{layer}.")]  # noqa: SIM118 — no mapping
        held = {name.split(".")[1]: saved.get_tensor(name) for name in mine}
    kind, record = json.loads(notes[str(layer)])
    return WEIGHTS[kind](**held), record
