"""Healing of the whole model at once, where it fits into memory: the distribution of the next token meets the original's.

All layers are folded on the original stream first; behind the last one that stream is the target. Errors of many layers add up,
and no layer knows which of its own matter at the output: healing there needs far fewer tokens than layer by layer.
"""

import io
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from kvfold.convert import processes
from kvfold.convert.compiled import compiled_where_it_pays
from kvfold.convert.conversion import Conversion, Report
from kvfold.convert.duration import announced, seconds_of, training_seconds
from kvfold.convert.folding import OpenLayer, designs_of, fold_layer, packed, reopen_layer, unpacked
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.data import Windows
from kvfold.convert.source.stream import HiddenStates, SourceModel, logit_cap
from kvfold.errors import ConversionError
from kvfold.surgery.designs import weights_of
from kvfold.surgery.healing import COARSE_KL, Looks, Progress, by_error, drawn, heal, kept_back
from kvfold.surgery.output import output_divergence

RATE = 0.03
"""The learning rate times the root of the hidden size: sums over more numbers want smaller steps of each. Three times as much
makes SmolLM2 worse on windows held out once the rate has risen, whatever it learns of the others."""
PIECE = 2048
"""Tokens that run forward and back at a time; a step of more adds up their gradients."""
FOLDING = 0.3
"""The share of the work that folding is taken for until its first layer has been timed."""
KEEP_SECONDS = 300.0
"""How often healing is written down for a resume."""
HEALED = "healed "
"""How the journal names a state of healing, before its steps."""
SHALLOW = 8
"""Layers of a model that is healed in windows: its errors add up little, and a window learns more from as many steps."""

Output = tuple[Callable[[Tensor], Tensor], Tensor, float | None]
"""What maps the last layer's states to what the output embedding reads, that embedding in the dtype of the products, and what
soft-caps the logits."""


def heals_whole(job: Conversion, source: SourceModel, windows: Windows) -> bool:
    """Whether the model is healed at once: as asked for, as begun, or else where it is deep and fits into memory."""
    settings = job.plan.settings
    if settings.heal_window != "auto" or not settings.heal_steps:
        return settings.heal_window == "all" and settings.heal_steps > 0
    if job.writer.finished:
        return _unit(job.plan.folded[0]) in job.writer.finished
    weights = sum(p.numel() for p in source.base.parameters()) + job.plan.spec.vocab_size * job.plan.spec.hidden_size
    return worth_and_fits(job.plan, weights, windows.ids.shape[1], min(processes.gathered(free_bytes(source.device))))


def worth_and_fits(plan: ConversionPlan, weights: int, tokens: int, free: float) -> bool:
    """Whether a model of so many weights is deep enough to be healed at once, and that fits into `free` bytes."""
    return len(plan.folded) > SHALLOW and needed_bytes(plan, weights, tokens) <= 0.6 * free


def needed_bytes(plan: ConversionPlan, weights: int, tokens: int) -> int:
    """An estimate of what healing the whole model takes on windows of `tokens`: float32 weights, those of an untied output
    embedding among them, four more of each that learns, activations."""
    spec = plan.spec
    learning = len(plan.folded) * spec.hidden_size * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    # A token keeps about forty vectors of a layer, and its scores against the window several times.
    activations = 2 * PIECE * spec.layers * (40 * spec.hidden_size + 5 * spec.heads * tokens)
    return 4 * (weights + 4 * learning) + activations


def free_bytes(device: torch.device) -> int:
    """What this process may take of a device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes.here()


def fold_whole(job: Conversion, source: SourceModel, windows: Windows, report: Report) -> None:
    """Fold all layers, heal them together, write them. Raises ConversionError when something is not finite.

    Healing wants the original's stream behind the last layer alone: more text costs one pass, and teaches more than the same
    text again.
    """
    file = processes.own_file(job.writer.folder / "original.hidden")
    original = source.embed(windows.all, file)
    original.studied = len(windows.ids)
    if job.plan.settings.token_weights == "nll":
        original.weights = SourceModel(job.reader, job.plan.family, source.device, windows.ids.shape[1]).surprise(windows.ids)
    norm, head = source.output()
    output = norm, head.to(autocast_of(job.plan.settings) or torch.float32), logit_cap(source.model.config)
    layers: list[OpenLayer] = []
    fresh, started, share = not job.writer.finished, time.monotonic(), FOLDING
    for layer in range(job.layers):
        report(share * layer / job.layers, f"layer {layer + 1}/{job.layers}: folding")
        layers.append(_open(job, source, layer, original))
        if layer == job.plan.folded[0] and fresh:
            folding = (time.monotonic() - started) * len(job.plan.folded)
            healing = _seconds(job, source, output, layers[-1], original)
            report(None, announced(folding, healing))
            share = 0.9 * folding / (folding + healing)

    def healing_report(done: float, line: str) -> None:
        report(share + (0.9 - share) * done, line)

    record = _heal(job, source, output, windows.all, original, layers, healing_report)
    file.unlink(missing_ok=True)
    for layer, item in enumerate(layers):
        if item.design is not None and not job.finished(layer):
            job.write(weights_of(item.design), layer)
            job.writer.finish(job.unit(layer), {**item.record, **record})


def _open(job: Conversion, source: SourceModel, layer: int, original: HiddenStates) -> OpenLayer:
    """A layer folded now or before an interruption; the original stream moves behind it."""
    if layer not in job.plan.folded:
        return reopen_layer(source, layer, original)
    name = f"folded-{layer}.safetensors"
    if _unit(layer) in job.writer.finished and (kept := unpacked(job.writer.folder / name, layer)) is not None:
        return reopen_layer(source, layer, original, *kept)
    item = fold_layer(job, source, layer, original)
    job.writer.keep(name, packed([(layer, item)]))
    job.writer.finish(_unit(layer), {})
    return item


def _unit(layer: int) -> str:
    return f"folded {layer}"


def _seconds(job: Conversion, source: SourceModel, output: Output, first: OpenLayer, original: HiddenStates) -> float:
    """What healing will take, from a pass of one layer and of the output over a piece of the tokens."""
    settings, tokens = job.plan.settings, original.data.shape[1]
    together = min(PIECE * processes.count(), settings.heal_batch_tokens) // tokens
    hidden = original.data[: max(1, processes.held(together))].to(source.device)
    norm, head, cap = output
    seconds = job.layers * training_seconds(first, hidden, autocast_of(settings))
    seconds += seconds_of(lambda: output_divergence(norm(hidden).requires_grad_(), norm(hidden), head, cap), source.device)
    pieces = settings.heal_batch_tokens // (processes.count() * hidden[..., 0].numel())
    return settings.heal_steps * max(1, pieces) * seconds


def autocast_of(settings: ConvertSettings) -> torch.dtype | None:
    """The dtype of healing's matrix products, None for the tensors' own."""
    return torch.bfloat16 if settings.heal_dtype == "bfloat16" else None


def failed(settings: ConvertSettings, found: FloatingPointError, where: str = "") -> ConversionError:
    """What to do about a loss that is not finite."""
    dtype = "pass --heal-dtype float32, " if settings.heal_dtype == "bfloat16" else ""
    return ConversionError(f"{where}{found}; {dtype}lower --heal-lr, or turn healing off with --heal-steps 0")


def _heal(
    job: Conversion,
    source: SourceModel,
    output: Output,
    ids: Tensor,
    original: HiddenStates,
    layers: list[OpenLayer],
    report: Callable[[float, str], None],
) -> dict[str, Any]:
    """Train all layers on the KL from the original at the output; what it was on held-out windows before and after.

    The layers are left as they were when it was least, before the first step included: a text that is gone over several times
    is learned by heart in the end.
    """
    settings, started = job.plan.settings, time.time()
    rows, tokens = ids.shape
    held_out = kept_back(original.studied)
    size = min(rows - held_out, max(1, settings.heal_batch_tokens // tokens))
    generator = torch.Generator().manual_seed(settings.seed)
    autocast = autocast_of(settings)
    begin = source.beginning()
    norm, head, cap = output
    ids = processes.share(ids)
    blocks, designs = [item.block for item in layers], designs_of(layers)

    def batch(pick: Tensor | slice) -> tuple[Tensor, Tensor]:
        return begin(ids[pick]), original.data[pick].to(source.device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for pick in drawn(rows - held_out, size, generator):
            mine = processes.own(held_out + pick)
            yield batch(mine) if len(mine) else (original.data[mine], original.data[mine])

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return output_divergence(norm(hidden), norm(target), head, cap)

    @torch.no_grad()
    def measure() -> float:
        total, measured = 0.0, processes.held(max(1, held_out))  # a text of one window has none to hold out
        for row in range(measured):
            hidden, target = batch(slice(row, row + 1))
            with torch.autocast(source.device.type, autocast, enabled=autocast is not None):
                for block in blocks:
                    hidden = block(hidden)
            total += float(loss(hidden.float(), target)) / measured
        return processes.mean(total, measured)

    def progress(step: int, value: float) -> None:
        report(step / settings.heal_steps, f"healing all layers, KL {value:.3f}")

    parameters = [p for module in designs for p in module.parameters()]
    begun, looks = _kept(job, parameters)
    looks = looks or Looks.begun(measure(), parameters)
    last = time.monotonic()

    def keep(now: Progress) -> bool:
        nonlocal last
        ended = looks.behind(now.steps, settings.heal_steps, measure, parameters)
        if processes.is_main() and (ended or time.monotonic() - last > KEEP_SECONDS):
            _keep(job, now, parameters, looks)
            last = time.monotonic()
        return ended

    if begun is None or not looks.ended(begun.steps, settings.heal_steps):
        try:
            heal(
                blocks,
                designs,
                islice(batches(), begun.steps if begun else 0, None),
                settings.heal_steps,
                settings.heal_lr or RATE * job.plan.spec.hidden_size**-0.5,
                loss=loss,
                scale=lambda first: by_error(first, COARSE_KL),
                piece=max(1, PIECE // tokens),
                autocast=autocast,
                report=progress,
                begun=begun,
                keep=keep,
                rows=size,
                total=processes.total,
                unheard=compiled_where_it_pays(blocks, settings.heal_steps * settings.heal_batch_tokens),
            )
        except FloatingPointError as found:
            raise failed(settings, found) from None
    looks.restore(parameters)
    return {"output_kl": looks.record(), "healed_on_tokens": rows * tokens, "healing_seconds": round(time.time() - started, 2)}


def _keep(job: Conversion, now: Progress, parameters: list[nn.Parameter], looks: Looks) -> None:
    """Write down where healing stands; of the states before, the last stays until the next one is to be written."""
    states = [_state(unit) for unit in job.writer.finished if unit.startswith(HEALED)]
    for name in states[:-1]:  # first, for a state may be several times as large as what comes of it
        (job.writer.folder / name).unlink(missing_ok=True)
    for name in states:
        job.writer.drop(name)
    # Behind the last step nobody needs the optimizer, which is most of a state.
    ended = looks.ended(now.steps, job.plan.settings.heal_steps)
    progress = {**vars(now), "optimizer": None if ended else now.optimizer}
    data = io.BytesIO()
    held = [] if ended else [p.detach() for p in parameters]
    torch.save({"progress": progress, "parameters": held, "looks": vars(looks)}, data)
    unit = f"{HEALED}{now.steps}"
    job.writer.keep(_state(unit), data.getbuffer())  # no copy: memory may be short
    job.writer.finish(unit, {})


def _kept(job: Conversion, parameters: list[nn.Parameter]) -> tuple[Progress | None, Looks | None]:
    """Where an interrupted healing stood, with its parameters put in, and what it had seen."""
    units = [unit for unit in job.writer.finished if unit.startswith(HEALED)]
    if not units:
        return None, None
    file = job.writer.folder / _state(units[-1])
    saved = processes.from_main(lambda: torch.load(file, map_location="cpu", weights_only=True))
    with torch.no_grad():
        for p, value in zip(parameters, saved["parameters"], strict=False):  # of one that ended there are none
            p.copy_(value)
    looks = Looks(**saved["looks"])
    looks.parameters = [value.to(p) for p, value in zip(parameters, looks.parameters, strict=True)]
    return Progress(**saved["progress"]), looks


def _state(unit: str) -> str:
    return f"{unit.replace(' ', '-')}.pt"
