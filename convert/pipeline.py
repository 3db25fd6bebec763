"""The conversion: read a layer, fold it, heal it, write it, next layer.

Without calibration text the tensors of each layer are folded by themselves. With it, two streams of hidden states run
over the same tokens: the original's, through the source's layers, and the folded one, through the layers as they were
written. Layers are opened (read, folded) on the original stream up to `heal_window` ahead, healed together so that the folded
stream meets the original behind the window, and then the first of them is written and both go one layer on.
"""

import json
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import InitVar, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import kvfold
from kvfold.convert.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec, refuse_existing
from kvfold.convert.data import Windows, calibration_windows
from kvfold.convert.layouts import source as source_layout
from kvfold.convert.plan import ConversionPlan, ConvertSettings, make_plan, normal_dtype, parse_size
from kvfold.convert.source import fetch_checkpoint, fetch_config
from kvfold.convert.stream import Block, HiddenStates, SourceModel, check_finite
from kvfold.errors import ConversionError, UserError
from kvfold.surgery import grouping
from kvfold.surgery.attention import AttentionWeights, GroupedAttention
from kvfold.surgery.healing import heal, relative_error
from kvfold.surgery.lowrank import SecondMoment

MEASURED_TOKENS = 8192
"""Calibration tokens on which the candidates of a layer are compared."""
SIDE_FILES_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
RECORD = "kvfold.json"

Report = Callable[[float, str], None]
"""Called with the share of the work that is done and a line on what is going on."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: where the checkpoint lies and what kvfold.json says of it."""

    out: Path
    record: dict[str, Any]


def convert(
    source: str,
    out: Path,
    settings: ConvertSettings,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda share, line: None,
) -> Conversion:
    """Fold the checkpoint `source` (local folder or Hub id) into `out`.

    Raises:
        UserError: the plan refuses, `out` exists, or the source or the calibration text is unusable. Nothing is written.
        ConversionError: it failed on the way; `OUT.partial` keeps the finished layers for `resume`.
    """
    started = time.time()
    refuse_existing(out, overwrite)
    plan = make_plan(fetch_config(source, settings.revision), settings)
    plan.refuse()
    device = pick_device(settings.device)
    folder = fetch_checkpoint(source, settings.revision)
    reader = CheckpointReader(folder)
    windows = calibration_windows(plan, folder, device, lambda line: report(0.0, line))

    dtype = getattr(torch, name) if (name := normal_dtype(settings.dtype)) else None
    specs = source_layout.tensor_specs(reader, plan.family, plan.spec, plan.kv_heads, dtype)
    _refuse_missing(plan, reader)
    job = {
        "kvfold": kvfold.__version__,
        "source": str(source),
        "settings": settings.model_dump(),
        "files": {f.name: f.stat().st_size for f in sorted({e.file for e in reader.entries.values()})},
    }
    with CheckpointWriter(out, specs, parse_size(settings.max_shard_size), job, resume, overwrite) as writer:
        try:
            if windows is None:
                _fold_alone(plan, reader, writer, device, report)
            else:
                _fold_on_stream(plan, reader, writer, device, windows, report)
            _copy_rest(plan, reader, writer, specs, report)
        except OSError as error:
            raise ConversionError(
                f"writing {writer.partial} failed ({error.strerror or error}): free the disk and repeat with --resume"
            ) from error
        record = {
            "version": kvfold.__version__,
            "source": str(source),
            "revision": settings.revision,
            "settings": settings.model_dump(),
            "target": {"to": settings.to, "kv_heads": plan.kv_heads, "method": plan.method, "grouping": plan.grouping},
            "kv_budget": plan.kv_budget,
            "cache_numbers_per_token_per_layer": plan.cache_numbers,
            "calibration_tokens": 0 if windows is None else windows.ids.numel(),
            "layers": [writer.finished[_unit(i)] for i in range(plan.spec.layers)],
            "seconds": round(time.time() - started, 2),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if device.type == "cuda":
            record["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        config = source_layout.config(reader.config, plan.spec, plan.kv_heads, dtype)
        files = {"config.json": json.dumps(config, indent=2) + "\n", RECORD: json.dumps(record, indent=2) + "\n"}
        writer.commit(files, _side_files(folder))
    report(1.0, "done")
    return Conversion(out, record)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available here: use auto, cpu or cuda") from None
    return device


def _refuse_missing(plan: ConversionPlan, reader: CheckpointReader) -> None:
    for layer in range(plan.spec.layers):
        for name in plan.family.names(layer, plan.spec).values():
            reader.entry(name)


def _read_attention(plan: ConversionPlan, reader: CheckpointReader, layer: int) -> AttentionWeights:
    names = plan.family.names(layer, plan.spec)
    return plan.family.lift({role: reader.tensor(name) for role, name in names.items()}, plan.spec)


def _candidates(
    plan: ConversionPlan, weights: AttentionWeights, layer: int, moment: Tensor | None
) -> Iterator[tuple[str, AttentionWeights]]:
    """What the method offers for this layer, each with a label."""
    generator = torch.Generator().manual_seed(plan.settings.seed * 100_003 + layer)
    if plan.grouping == "similar":
        groups = grouping.similar(weights, plan.kv_heads, moment)
    else:
        groups = grouping.neighbours(plan.spec.kv_heads, plan.kv_heads)
    ordered = grouping.permute_heads(weights, groups)
    yield from grouping.candidates(plan.method, ordered, plan.kv_heads, moment, generator)


def _write_layer(plan: ConversionPlan, writer: CheckpointWriter, layer: int, weights: AttentionWeights) -> None:
    for name, tensor in source_layout.tensors(weights, plan.family.names(layer, plan.spec)).items():
        writer.write(name, tensor)


# Without calibration text


def _fold_alone(
    plan: ConversionPlan,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    device: torch.device,
    report: Report,
) -> None:
    # Pooling is an average: float32 is exact enough and half the memory. Factorisations get float64.
    dtype = torch.float32 if plan.method in ("mean", "first", "random") else torch.float64
    for layer in range(plan.spec.layers):
        report(0.5 * layer / plan.spec.layers, f"layer {layer + 1}/{plan.spec.layers}: {plan.method}")
        if _unit(layer) in writer.finished:
            continue
        weights = _read_attention(plan, reader, layer).to(device, dtype)
        label, folded = next(_candidates(plan, weights, layer, None))
        _write_layer(plan, writer, layer, folded)
        writer.finish(_unit(layer), {"choice": label})


# With calibration text


@dataclass
class _OpenLayer:
    """A layer that has been folded but not written: its block, and what there is to say of it."""

    block: Block
    weights: InitVar[AttentionWeights]
    choice: str
    error: float

    def __post_init__(self, weights: AttentionWeights) -> None:
        self.set_weights(weights)

    def set_weights(self, weights: AttentionWeights) -> None:
        self.design = GroupedAttention(weights.to(self.block.device, torch.float32))
        self.block.set_attention(self.design)


def _fold_on_stream(
    plan: ConversionPlan,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    device: torch.device,
    windows: Windows,
    report: Report,
) -> None:
    settings, layers = plan.settings, plan.spec.layers
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    source = SourceModel(reader, plan.family, device, windows.ids.shape[1])
    report(0.0, "embedding")
    on_disk = HiddenStates.needs_disk((*windows.ids.shape, plan.spec.hidden_size))
    files = [writer.partial / f"{name}.hidden" for name in ("original", "folded")]
    original, folded = (source.embed(windows.ids, file if on_disk else None) for file in files)
    ahead = settings.heal_window if settings.heal_steps else 1
    waiting: deque[_OpenLayer] = deque()
    for layer in range(layers):
        started = time.time()
        share, title = 0.9 * layer / layers, f"layer {layer + 1}/{layers}"
        while len(waiting) < min(ahead, layers - layer):
            report(share, f"{title}: folding")
            waiting.append(_open_layer(plan, reader, writer, source, layer + len(waiting), original))
        current = waiting[0]
        if _unit(layer) not in writer.finished:
            record: dict[str, Any] = {"choice": current.choice, "block_error": current.error}
            if settings.heal_steps:

                def progress(step: int, loss: float, share: float = share, title: str = title) -> None:
                    done = step / settings.heal_steps
                    report(share + 0.9 * done / layers, f"{title}: healing, error {loss:.2e}")

                record["window_error"] = _heal(settings, layer, waiting, folded, original, device, progress)
            _write_layer(plan, writer, layer, current.design.weights())
            record["seconds"] = round(time.time() - started, 2)
            _save_waiting(plan, writer, layer, list(waiting)[1:])
            writer.finish(_unit(layer), record)
        # The folded stream runs through what was written, rounding included, so that the next layer repairs that too.
        current.set_weights(_read_written(plan, writer, layer))
        current.block.advance(folded)
        check_finite(folded.data, f"folded layer {layer}")
        waiting.popleft()
    for file in files:
        file.unlink(missing_ok=True)


def _open_layer(
    plan: ConversionPlan,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    source: SourceModel,
    layer: int,
    original: HiddenStates,
) -> _OpenLayer:
    """Read a layer, fold its attention by the candidate of least error, and move the original stream behind it."""
    block = source.block(layer)
    if _unit(layer) in writer.finished:
        block.advance(original)
        return _OpenLayer(block, _read_written(plan, writer, layer), "", 0.0)
    saved = _read_waiting(plan, writer, layer)
    if saved is not None:
        block.advance(original)
        return _OpenLayer(block, *saved)

    weights = _read_attention(plan, reader, layer).to(source.device, torch.float64)
    moment = SecondMoment(plan.spec.hidden_size, source.device)
    for rows in original.batches():
        moment.add(block.attention_input(original.data[rows].to(source.device)))
    measured = slice(0, max(1, MEASURED_TOKENS // original.data.shape[1]))
    before = original.data[measured].clone().to(source.device)  # the stream moves on in place
    block.advance(original)
    after = original.data[measured].to(source.device)
    check_finite(original.data, f"source layer {layer}")

    best: _OpenLayer | None = None
    for label, candidate in _candidates(plan, weights, layer, moment.value()):
        tried = _OpenLayer(block, candidate, label, 0.0)
        with torch.no_grad():
            tried.error = float(relative_error(block(before), after))
        if math.isfinite(tried.error) and (best is None or tried.error < best.error):
            best = tried
    if best is None:
        raise ConversionError(f"folding layer {layer} gave no finite result: check the source's weights there")
    block.set_attention(best.design)
    return best


def _heal(
    settings: ConvertSettings,
    layer: int,
    waiting: Iterable[_OpenLayer],
    folded: HiddenStates,
    original: HiddenStates,
    device: torch.device,
    report: Callable[[int, float], None],
) -> dict[str, float]:
    """Train the waiting layers so that the folded stream meets the original behind them; the error before and after."""
    rows, tokens, _ = folded.data.shape
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + layer)
    size = min(rows, max(1, settings.heal_batch_tokens // tokens))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for pick in torch.randperm(rows, generator=generator)[: rows // size * size].split(size):
                yield folded.data[pick].to(device), original.data[pick].to(device)

    blocks = [item.block for item in waiting]
    parameters = [p for item in waiting for p in item.design.parameters()]
    try:
        curve = heal(blocks, parameters, batches(), settings.heal_steps, settings.heal_lr, report=report)
    except FloatingPointError as error:
        raise ConversionError(f"layer {layer}: {error}; lower --heal-lr, or turn healing off with --heal-steps 0") from None
    tail = curve[-max(1, len(curve) // 20) :]
    return {"before": curve[0], "after": sum(tail) / len(tail)}


# Journal and resume


def _unit(layer: int) -> str:
    return f"layer {layer}"


def _read_written(plan: ConversionPlan, writer: CheckpointWriter, layer: int) -> AttentionWeights:
    names = plan.family.names(layer, plan.spec)
    spec = replace(plan.spec, kv_heads=plan.kv_heads)
    return plan.family.lift({role: writer.read(name) for role, name in names.items()}, spec)


def _waiting_file(writer: CheckpointWriter, layer: int) -> Path:
    return writer.partial / f"waiting-behind-{layer}.safetensors"


def _save_waiting(plan: ConversionPlan, writer: CheckpointWriter, layer: int, waiting: Iterable[_OpenLayer]) -> None:
    """Keep the layers behind `layer` as its healing left them, unrounded, for a resume."""
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for number, item in enumerate(waiting, layer + 1):
        tensors |= source_layout.tensors(item.design.weights(), plan.family.names(number, plan.spec))
        notes[str(number)] = json.dumps([item.choice, item.error])
    if tensors:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, _waiting_file(writer, layer), notes)
    _waiting_file(writer, layer - 2).unlink(missing_ok=True)  # the last but one: the journal may still name the last


def _read_waiting(plan: ConversionPlan, writer: CheckpointWriter, layer: int) -> tuple[AttentionWeights, str, float] | None:
    file = _waiting_file(writer, len(writer.finished) - 1)
    if not file.exists():
        return None
    with safe_open(file, "pt") as saved:
        notes = saved.metadata() or {}
        if str(layer) not in notes:
            return None
        names = plan.family.names(layer, plan.spec)
        spec = replace(plan.spec, kv_heads=plan.kv_heads)
        weights = plan.family.lift({role: saved.get_tensor(name) for role, name in names.items()}, spec)
    choice, error = json.loads(notes[str(layer)])
    return weights, choice, error


# Everything else


def _copy_rest(
    plan: ConversionPlan, reader: CheckpointReader, writer: CheckpointWriter, specs: Iterable[TensorSpec], report: Report
) -> None:
    """Copy what is not attention, byte for byte."""
    folded = {n for layer in range(plan.spec.layers) for n in plan.family.names(layer, plan.spec).values()}
    rest = [s for s in specs if s.name not in folded]
    total, done = sum(s.size for s in rest), 0
    begun = 0.9 if plan.settings.calibrate else 0.5
    for spec in rest:
        report(begun + (1 - begun) * done / total, "copying the rest")
        writer.copy(spec.name, reader)
        done += spec.size


def _side_files(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config, licence and the like. Not the model card, which tells of other weights."""
    left = {"config.json", RECORD, "README.md"}
    return [
        p
        for p in sorted(folder.iterdir())
        if p.is_file() and p.name not in left and not p.name.startswith(".") and not p.name.endswith(SIDE_FILES_LEFT)
    ]
