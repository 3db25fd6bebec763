"""Folding on streams of hidden states, with healing a window of layers at a time.

Two streams run over the same calibration tokens: the original's, through the source's layers, and the folded one, through the
layers as they were written. Layers are opened (read, folded) on the original stream up to `heal_window` ahead, healed together
so that the folded stream meets the original behind the window, and then the first of them is written and both go one layer on.
Where the whole model fits into memory it is healed at once instead: heal_whole.py.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from kvfold.convert import processes
from kvfold.convert.compiled import compiled_where_it_pays
from kvfold.convert.conversion import Conversion, Report
from kvfold.convert.duration import announced, training_seconds
from kvfold.convert.folding import OpenLayer, designs_of, fold_layer, packed, reopen_layer, unpacked
from kvfold.convert.heal_whole import autocast_of, failed, fold_whole, heals_whole
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.source.data import Windows
from kvfold.convert.source.stream import HiddenStates, SourceModel, check_finite
from kvfold.surgery.designs import weights_of
from kvfold.surgery.healing import Looks, drawn, heal, kept_back, relative_error

WINDOW, WINDOW_RATE = 2, 2e-2
"""Layers in a window, and the learning rate of its healing."""

REPEATED = 32
"""How often healing may go over its text before a line says so."""


def fold_on_stream(job: Conversion, device: torch.device, windows: Windows, report: Report) -> None:
    """Fold and heal every layer on the calibration tokens. Raises ConversionError when something is not finite."""
    plan, settings, layers = job.plan, job.plan.settings, job.layers
    if all(job.finished(layer) for layer in plan.folded):
        return
    source = SourceModel(job.reader, plan.family, device, windows.ids.shape[1])
    whole = heals_whole(job, source, windows)
    tokens = (windows.all if whole else windows.ids).numel()
    if (passes := settings.heal_steps * settings.heal_batch_tokens / tokens) > REPEATED:
        line = f"healing goes {passes:.0f} times over the {tokens:,} tokens of calibration text: give more of it"
        report(None, f"{line}, or --heal-steps {max(1, REPEATED * tokens // settings.heal_batch_tokens)}")
    if whole:
        fold_whole(job, source, windows, report)
        return
    report(0.0, "embedding")
    names = ("original", "folded") if settings.heal_steps else ("original",)
    files = [processes.own_file(job.writer.folder / f"{name}.hidden") for name in names]
    streams = [source.embed(windows.ids, file, copies=len(files) - n) for n, file in enumerate(files)]
    if settings.token_weights == "nll":
        report(0.0, "weighing tokens")
        streams[0].weights = SourceModel(job.reader, plan.family, device, windows.ids.shape[1]).surprise(windows.ids)
    original, folded = streams[0], streams[-1]  # without healing nothing reads the folded stream
    ahead = (settings.heal_window if isinstance(settings.heal_window, int) else WINDOW) if settings.heal_steps else 1
    waiting: deque[OpenLayer] = deque()
    announce = not job.writer.finished
    for layer in range(plan.folded[-1] + 1):
        started = time.time()
        share, title = 0.9 * layer / layers, f"layer {layer + 1}/{layers}"
        while len(waiting) < min(ahead, layers - layer):
            report(share, f"{title}: folding")
            before = time.monotonic()
            waiting.append(_open(job, source, layer + len(waiting), original))
            if announce and waiting[-1].design is not None:
                announce, folding = False, (time.monotonic() - before) * len(plan.folded)
                report(None, announced(folding, _seconds(job, waiting[-1], original, ahead) if settings.heal_steps else 0.0))
        current = waiting[0]
        if current.design is not None and not job.finished(layer):
            record = dict(current.record)
            if settings.heal_steps:

                def progress(step: int, loss: float, share: float = share, title: str = title) -> None:
                    done = step / settings.heal_steps
                    report(share + 0.9 * done / layers, f"{title}: healing, error {loss:.2e}")

                record["window_error"] = _heal(plan, layer, waiting, folded, original, device, progress)
            job.write(weights_of(current.design), layer)
            record["seconds"] = round(time.time() - started, 2)
            if len(waiting) > 1:
                job.writer.keep(_waiting(layer), packed(enumerate(list(waiting)[1:], layer + 1)))
            job.writer.drop(_waiting(max((n for n in plan.folded if n < layer), default=-1)))
            job.writer.finish(job.unit(layer), record)
        if settings.heal_steps and layer < plan.folded[-1]:
            # The folded stream runs through what was written, rounding included: the next layer repairs that too.
            if current.design is not None:
                current.set_weights(job.shared_written(layer))
            current.block.advance(folded)
            check_finite(folded.data, f"folded layer {layer}")
        waiting.popleft()
        del current  # or its block stays while the next one is folded
    for file in files:
        file.unlink(missing_ok=True)


def _seconds(job: Conversion, first: OpenLayer, original: HiddenStates, ahead: int) -> float:
    """What healing will take, from a pass of one layer over a batch."""
    tokens = original.data.shape[1]
    hidden = original.data[: max(1, processes.held(job.plan.settings.heal_batch_tokens // tokens))].to(first.block.device)
    settings = job.plan.settings
    return settings.heal_steps * len(job.plan.folded) * ahead * training_seconds(first, hidden, autocast_of(settings))


def _open(job: Conversion, source: SourceModel, layer: int, original: HiddenStates) -> OpenLayer:
    """A layer folded now or before an interruption, or one that stays as it is; the original stream moves behind it."""
    if layer not in job.plan.folded:
        return reopen_layer(source, layer, original)
    if job.finished(layer):
        return reopen_layer(source, layer, original, job.shared_written(layer))
    last = max((n for n in job.plan.folded if job.finished(n)), default=-1)
    saved = unpacked(job.writer.folder / _waiting(last), layer)
    if saved is not None:
        return reopen_layer(source, layer, original, *saved)
    return fold_layer(job, source, layer, original)


def _waiting(layer: int) -> str:
    """The file of the layers that wait behind `layer`, as its healing left them."""
    return f"waiting-behind-{layer}.safetensors"


def _heal(
    plan: ConversionPlan,
    layer: int,
    waiting: Iterable[OpenLayer],
    folded: HiddenStates,
    original: HiddenStates,
    device: torch.device,
    report: Callable[[int, float], None],
) -> dict[str, float]:
    """Train the waiting layers so that the folded stream meets the original behind them; the error before and after.

    Both are of windows held out; the layers are left as they were when it was least.
    """
    settings = plan.settings
    tokens, held_out = folded.data.shape[1], kept_back(folded.windows)
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + layer)
    size = min(folded.windows - held_out, max(1, settings.heal_batch_tokens // tokens))
    measured = processes.held(max(1, held_out))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for pick in drawn(folded.windows - held_out, size, generator):
            mine = processes.own(held_out + pick)
            yield folded.data[mine].to(device), original.data[mine].to(device)

    blocks = [item.block for item in waiting]
    designs = designs_of(waiting)
    parameters = [p for module in designs for p in module.parameters()]

    @torch.no_grad()
    def error() -> float:
        total = 0.0
        for rows in folded.batches(0, measured):
            hidden = folded.data[rows].to(device)
            for block in blocks:
                hidden = block(hidden)
            total += float(relative_error(hidden, original.data[rows].to(device))) * len(hidden)
        return total / max(1, measured)

    def measure() -> float:
        return processes.mean(folded.with_less(error), measured)

    looks = Looks.begun(measure(), parameters)
    try:
        heal(
            blocks,
            designs,
            batches(),
            settings.heal_steps,
            settings.heal_lr or WINDOW_RATE,
            autocast=autocast_of(settings),
            report=report,
            keep=lambda now: looks.behind(now.steps, settings.heal_steps, measure, parameters),
            rows=size,
            total=processes.total,
            unheard=compiled_where_it_pays(blocks, len(plan.folded) * settings.heal_steps * settings.heal_batch_tokens),
        )
    except FloatingPointError as found:
        raise failed(settings, found, f"layer {layer}: ") from None
    looks.restore(parameters)
    return looks.record()
