"""Folding on streams of hidden states, with healing.

Two streams run over the same calibration tokens: the original's, through the source's layers, and the folded one,
through the layers as they were written. Layers are opened (read, folded) on the original stream up to `heal_window` ahead,
healed together so that the folded stream meets the original behind the window, and then the first of them is written and both
go one layer on.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kvfold.convert.candidates import best
from kvfold.convert.data import Windows
from kvfold.convert.job import Job, Report
from kvfold.convert.observe import observe, refit_output
from kvfold.convert.settings import ConvertSettings
from kvfold.convert.stream import Block, HiddenStates, SourceModel, check_finite
from kvfold.errors import ConversionError
from kvfold.surgery.designs import WEIGHTS, FoldedWeights, design
from kvfold.surgery.healing import heal, relative_error

REFITTED = ("kvfold", "pca")
"""Methods whose output projection is fitted to the folded heads; the others are left as they were published."""


@dataclass
class _OpenLayer:
    """A layer that has been folded but not written: its block, and what there is to say of it."""

    block: Block
    weights: InitVar[FoldedWeights]
    choice: str
    error: float

    def __post_init__(self, weights: FoldedWeights) -> None:
        self.set_weights(weights)

    def set_weights(self, weights: FoldedWeights) -> None:
        self.design = design(weights.to(self.block.device, torch.float32))
        self.block.set_attention(self.design)


def fold_on_stream(job: Job, device: torch.device, windows: Windows, report: Report) -> None:
    """Fold and heal every layer on the calibration tokens. Raises ConversionError when something is not finite."""
    plan, settings, layers = job.plan, job.plan.settings, job.layers
    if all(job.finished(layer) for layer in range(layers)):
        return
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    source = SourceModel(job.reader, plan.family, device, windows.ids.shape[1])
    report(0.0, "embedding")
    on_disk = HiddenStates.needs_disk((*windows.ids.shape, plan.spec.hidden_size))
    files = [job.writer.folder / f"{name}.hidden" for name in ("original", "folded")]
    streams = [source.embed(windows.ids, file if on_disk else None) for file in files[: 2 if settings.heal_steps else 1]]
    if settings.token_weights == "nll":
        report(0.0, "weighing tokens")
        streams[0].weights = SourceModel(job.reader, plan.family, device, windows.ids.shape[1]).surprise(windows.ids)
    original, folded = streams[0], streams[-1]  # without healing nothing reads the folded stream
    ahead = settings.heal_window if settings.heal_steps else 1
    waiting: deque[_OpenLayer] = deque()
    for layer in range(layers):
        started = time.time()
        share, title = 0.9 * layer / layers, f"layer {layer + 1}/{layers}"
        while len(waiting) < min(ahead, layers - layer):
            report(share, f"{title}: folding")
            waiting.append(_open_layer(job, source, layer + len(waiting), original))
        current = waiting[0]
        if not job.finished(layer):
            record: dict[str, Any] = {"choice": current.choice, "block_error": current.error}
            if settings.heal_steps:

                def progress(step: int, loss: float, share: float = share, title: str = title) -> None:
                    done = step / settings.heal_steps
                    report(share + 0.9 * done / layers, f"{title}: healing, error {loss:.2e}")

                record["window_error"] = _heal(settings, layer, waiting, folded, original, device, progress)
            job.write(current.design.weights(), layer)
            record["seconds"] = round(time.time() - started, 2)
            _save_waiting(job, layer, list(waiting)[1:])
            job.writer.finish(job.unit(layer), record)
        if settings.heal_steps and layer < layers - 1:
            # The folded stream runs through what was written, rounding included: the next layer repairs that too.
            current.set_weights(job.read_written(layer))
            current.block.advance(folded)
            check_finite(folded.data, f"folded layer {layer}")
        waiting.popleft()
    for file in files:
        file.unlink(missing_ok=True)


def _open_layer(job: Job, source: SourceModel, layer: int, original: HiddenStates) -> _OpenLayer:
    """Read a layer, fold its attention by the candidate of least error, and move the original stream behind it."""
    block = source.block(layer)
    if job.finished(layer):
        block.advance(original)
        return _OpenLayer(block, job.read_written(layer), "", 0.0)
    saved = _read_waiting(job, layer)
    if saved is not None:
        block.advance(original)
        return _OpenLayer(block, *saved)

    seen = observe(job.plan, source, layer, block, original)
    error, label, folded = best(job.plan, seen, layer)
    if error == math.inf:
        raise ConversionError(f"folding layer {layer} gave no finite result: check the source's weights there")
    if job.plan.method in REFITTED:
        refitted = refit_output(folded, block, original, bias=job.plan.layout == "kvfold")
        refitted_error = seen.measure(refitted)
        if refitted_error < error:
            error, folded = refitted_error, refitted
    block.advance(original)
    check_finite(original.data, f"source layer {layer}")
    return _OpenLayer(block, folded, label, error)


def _heal(
    settings: ConvertSettings,
    layer: int,
    waiting: Iterable[_OpenLayer],
    folded: HiddenStates,
    original: HiddenStates,
    device: torch.device,
    report: Callable[[int, float], None],
) -> dict[str, float]:
    """Train the waiting layers so that the folded stream meets the original behind them; the error before and after.

    Both are measured on the same tokens; where the error did not fall, the layers stay as they were.
    """
    rows, tokens, _ = folded.data.shape
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + layer)
    size = min(rows, max(1, settings.heal_batch_tokens // tokens))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for pick in torch.randperm(rows, generator=generator)[: rows // size * size].split(size):
                yield folded.data[pick].to(device), original.data[pick].to(device)

    blocks = [item.block for item in waiting]
    parameters = [p for item in waiting for p in item.design.parameters()]

    @torch.no_grad()
    def error() -> float:
        hidden = folded.data[:size].to(device)
        for block in blocks:
            hidden = block(hidden)
        return float(relative_error(hidden, original.data[:size].to(device)))

    before, kept = error(), [p.detach().clone() for p in parameters]
    try:
        autocast = torch.bfloat16 if settings.heal_dtype == "bfloat16" else None
        heal(blocks, parameters, batches(), settings.heal_steps, settings.heal_lr, autocast=autocast, report=report)
    except FloatingPointError as found:
        raise ConversionError(f"layer {layer}: {found}; lower --heal-lr, or turn healing off with --heal-steps 0") from None
    after = error()
    if not after < before:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)
    return {"before": before, "after": min(after, before)}


def _waiting_file(job: Job, layer: int) -> Path:
    return job.writer.folder / f"waiting-behind-{layer}.safetensors"


def _save_waiting(job: Job, layer: int, waiting: Iterable[_OpenLayer]) -> None:
    """Keep the layers behind `layer` as its healing left them, unrounded, for a resume."""
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for number, item in enumerate(waiting, layer + 1):
        held = item.design.weights()
        tensors |= {f"{number}.{name}": t.cpu().contiguous() for name, t in held.tensors().items()}
        notes[str(number)] = json.dumps([type(held).__name__, item.choice, item.error])
    if tensors:
        job.writer.keep(_waiting_file(job, layer).name, save(tensors, notes))
    _waiting_file(job, layer - 2).unlink(missing_ok=True)  # the last but one: the journal may still name the last


def _read_waiting(job: Job, layer: int) -> tuple[FoldedWeights, str, float] | None:
    """What `_save_waiting` kept of `layer` before an interruption: its weights, choice and error."""
    file = _waiting_file(job, len(job.writer.finished) - 1)
    if not file.exists():
        return None
    with safe_open(file, "pt") as saved:
        notes = saved.metadata() or {}
        if str(layer) not in notes:
            return None
        mine = [name for name in saved.keys() if name.startswith(f"{layer}.")]  # noqa: SIM118 — no mapping
        held = {name.split(".")[1]: saved.get_tensor(name) for name in mine}
    kind, choice, error = json.loads(notes[str(layer)])
    return WEIGHTS[kind](**held), choice, error
