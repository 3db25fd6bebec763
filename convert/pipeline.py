"""The conversion: read a layer, fold it, write it, next layer; then copy the rest and give the folder its name.

Without calibration text the tensors of each layer are folded by themselves, here. With it, the layers are folded and
healed on streams of hidden states: heal_windows.py.
"""

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import kvfold
from kvfold.convert import processes
from kvfold.convert.budgets import measured_widths
from kvfold.convert.conversion import Conversion, Report
from kvfold.convert.heal_whole import free_bytes
from kvfold.convert.heal_windows import fold_on_stream
from kvfold.convert.layouts import layout_of
from kvfold.convert.layouts.source import within
from kvfold.convert.methods import alone
from kvfold.convert.output.files import checksum_of_rows
from kvfold.convert.output.journal import differences, refuse_other
from kvfold.convert.output.partial import JOURNAL, Partial, partial_folder, refuse_existing, resumable
from kvfold.convert.output.record import RECORD, peak_memory, said_of_biases
from kvfold.convert.output.writer import Bystander, CheckpointWriter
from kvfold.convert.planning.cost import refuse_too_little
from kvfold.convert.planning.parameters import source_parameters
from kvfold.convert.planning.plan import COPY, ConversionPlan, cache_dtype, make_plan, settled
from kvfold.convert.planning.settings import ConvertSettings, normal_dtype, parse_size
from kvfold.convert.publishing.escape import visible
from kvfold.convert.source.checkpoint import CheckpointReader, TensorSpec, read_json
from kvfold.convert.source.data import Windows, calibration_windows
from kvfold.convert.source.fetch import fetch_checkpoint, fetch_config
from kvfold.convert.source.opening import identity, open_source
from kvfold.convert.source.sidefiles import side_files
from kvfold.convert.verify import verify
from kvfold.errors import UserError

POOLING = ("mean", "first", "random")
COPIED_AT_ONCE = 2
"""Tensors: while one is read and looked at, another is written."""


@dataclass(frozen=True)
class Converted:
    """What `convert` did: where the checkpoint lies, what kvfold.json says of it, which of the source's files stayed, and what
    else there is to say."""

    out: Path
    record: dict[str, Any]
    left: list[str]
    notes: list[str] = field(default_factory=list)


@processes.stopping_together()
def convert(
    source: str,
    out: Path,
    settings: ConvertSettings,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda share, line: None,
    check: bool = True,
) -> Converted:
    """Fold the checkpoint `source` (local folder or Hub id) into `out`, and with `check` verify it before it gets its name.

    Of several processes, under `accelerate launch` or torchrun, all must call it; they share the calibration text.

    Raises:
        UserError: the plan refuses, `out` exists, or the source or the calibration text is unusable. Nothing is written.
        ConversionError: it failed on the way; `OUT.partial` keeps the finished layers for `resume`.
    """
    started = time.time()
    if not resume:
        refuse_existing(out, overwrite)
    if Path(source).exists() and out.resolve() == Path(source).resolve():
        raise UserError(f"{out} is the source itself: choose another name")
    config = fetch_config(source, settings.revision)
    plan = make_plan(config, settings)
    plan.refuse(converting=True)
    device = pick_device(processes.join(settings.device))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # the stream stays float32, its products take their factors as TF32
    if not resume:
        parameters = source_parameters(config, plan.spec)
        refuse_too_little(plan, parameters, cache_dtype(config, settings), out, free_bytes(device), device.type)
    holding = Partial(out, JOURNAL, resume, overwrite) if processes.is_main() else nullcontext()
    with holding as partial, resumable(partial_folder(out)):
        for stale in partial.folder.glob("*.hidden") if partial is not None else ():
            stale.unlink()  # of more processes than there are now
        if processes.from_main(lambda: partial is not None and partial.finished):
            made = processes.from_main(lambda: read_json(out / RECORD))
            same = {"source": str(source), "settings": settings.model_dump()}
            refuse_other(out, {key: made.get(key) for key in same}, same)
            return Converted(out, made, [])
        folder = fetch_checkpoint(source, settings.revision)
        reader, side = open_source(folder), side_files(folder)
        plan = make_plan(reader.config, settings)  # once more, for what the tensors say otherwise
        plan.refuse(converting=True)
        windows = calibration_windows(plan, folder, device, lambda line: report(0.0, line))
        if processes.count() > 1:
            _refuse_disagreement(_asked(source, plan, reader, windows, times=False), windows)
        if plan.measures_widths and windows is not None:
            scratch = partial_folder(out) / "measured.hidden"
            plan = settled(plan, reader.config, measured_widths(plan, reader, device, windows, scratch, report))
        dtype = getattr(torch, name) if (name := normal_dtype(settings.dtype)) else None
        layout = layout_of(plan)
        specs = layout.tensor_specs(reader, plan, dtype)
        if plan.within:
            specs = within(specs, reader, dtype)
        asked = _asked(source, plan, reader, windows)
        shard = parse_size(settings.max_shard_size)
        with Bystander(partial_folder(out)) if partial is None else CheckpointWriter(partial, specs, shard, asked) as writer:
            writer.finished = processes.from_main(lambda: writer.finished)
            job = Conversion(plan, reader, writer, report)
            if windows is not None:
                fold_on_stream(job, device, windows, report)

            def complete() -> dict[str, Any]:
                with _copying_the_rest(job, specs, report):
                    if windows is None:
                        fold_alone(job, device, report)
                record = _record(source, job, 0 if windows is None else windows.ids.numel(), time.time() - started, device)
                config = layout.config(reader.config, plan, dtype)
                if check:
                    verify(job, config, None if windows is None else windows.ids, device, report)
                if plan.within and reader.view is not None:
                    config = reader.view.whole(config)
                files = {"config.json": json.dumps(config, indent=2) + "\n", RECORD: json.dumps(record, indent=2) + "\n"}
                writer.commit({**side.texts, **layout.files(), **files}, side.copies)
                return record

            record = processes.from_main(complete)
    report(1.0, "done")
    return Converted(out, record, side.left, _notes(reader, source, record))


def _asked(
    source: str, plan: ConversionPlan, reader: CheckpointReader, windows: Windows | None, times: bool = True
) -> dict[str, Any]:
    """What decides the result; `times` as `identity` takes it."""
    wanted = {"source": str(source), **plan.settings.model_dump(), "widths": plan.widths}
    return {
        "version": kvfold.__version__,
        "settings": {key: visible(value) if isinstance(value, str) else value for key, value in wanted.items()},
        "source files": identity(reader, times),
        "calibration text": None if windows is None else checksum_of_rows(windows.all),
    }


def _refuse_disagreement(asked: dict[str, Any], windows: Windows | None) -> None:
    """Raise UserError where processes were not started alike, or there are more of them than windows."""
    first, *others = processes.gathered(asked)
    for number, theirs in enumerate(others, 1):
        if differ := differences(first, theirs):
            raise UserError(
                f"process {number} has {differ} than process 0: start all with the same command, files and version of kvfold"
            )
    if windows is not None and processes.count() > len(windows.ids):
        raise UserError(
            f"there are {processes.count()} processes and {len(windows.ids)} windows of calibration text: start no more "
            "processes than there are windows, or give more text"
        )


def _record(source: str, job: Conversion, tokens: int, seconds: float, device: torch.device) -> dict[str, Any]:
    """What kvfold.json says."""
    plan, settings = job.plan, job.plan.settings
    record = {
        "version": kvfold.__version__,
        "source": str(source),
        "source_config": job.reader.config,
        "revision": settings.revision,
        "settings": settings.model_dump(),
        "target": plan.target(),
        "kv_budget": plan.kv_budget,
        "cache_numbers_per_token_per_layer": plan.cache_numbers,
        "calibration_tokens": tokens,
        "layers": [job.writer.finished[job.unit(i)] for i in plan.folded],
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
    }
    if device.type == "cuda":
        record["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return record


def _notes(reader: CheckpointReader, source: str, record: dict[str, Any]) -> list[str]:
    notes = [said] if (said := said_of_biases(record["layers"])) else []
    if reader.view is not None and not (reader.folder / "tokenizer.json").exists():
        notes.append(f"there is no tokenizer.json: its tokenizer may need the code of {source}")
    return notes


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} is not available here: use auto, cpu or cuda") from None
    return device


def fold_alone(job: Conversion, device: torch.device, report: Report) -> None:
    """Fold every layer from its own tensors."""
    # Pooling neighbours leaves queries and output as they are and stays in the checkpoint's dtype; all else gets float64.
    pooling = job.plan.method in POOLING and job.plan.grouping == "neighbours"
    if job.plan.method == COPY:
        return copy_attention(job)
    for layer in range(job.layers):
        report(0.5 * layer / job.layers, f"layer {layer + 1}/{job.layers}: {job.plan.method}")
        if job.finished(layer):
            continue
        weights = job.read(layer, ("q", "q_bias", "o", "o_bias")) if pooling else job.read(layer).to(device, torch.float64)
        label, folded = alone(job.plan, weights, layer)
        job.write(folded, layer)
        job.writer.finish(job.unit(layer), {"choice": label})


def copy_attention(job: Conversion) -> None:
    """Copy every layer's attention as it is read."""
    for layer in range(job.layers):
        if not job.finished(layer):
            for name in job.layout.names(layer, job.plan):
                job.writer.copy(name, job.reader)
            job.writer.finish(job.unit(layer), {"choice": COPY})


@contextmanager
def _copying_the_rest(job: Conversion, specs: Iterable[TensorSpec], report: Report) -> Iterator[None]:
    """Copy what is not attention: what stays as it is byte for byte, beside what is done in the context, and then all else."""
    folded = {name for layer in job.plan.folded for name in job.layout.names(layer, job.plan)}
    rest = [s for s in specs if s.name not in folded]
    origins = {s.name: job.layout.origin(s.name, job.plan) for s in rest}
    total, done = sum(s.size for s in rest), 0
    begun = 0.9 if job.plan.settings.calibrate else 0.5

    def copied(spec: TensorSpec) -> int:
        job.writer.copy(spec.name, job.reader, *origins[spec.name], journalled=False)
        return spec.size

    with ThreadPoolExecutor(COPIED_AT_ONCE) as pool:
        stays = {s.name: job.writer.stays(s.name, job.reader, *origins[s.name]) for s in rest}
        beside = [pool.submit(copied, s) for s in rest if stays[s.name]]
        try:
            yield
            for size in chain((copy.result() for copy in beside), (copied(s) for s in rest if not stays[s.name])):
                done += size
                report(begun + (1 - begun) * done / total, "copying the rest")
        finally:
            pool.shutdown(cancel_futures=True)
