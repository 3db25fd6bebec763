"""`kvfold uptrain`: train a folded checkpoint end to end against its original, and write it back in its own layout."""

import json
import math
import os
import shutil
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from transformers import PreTrainedModel

import kvfold
from kvfold.convert.output.files import checksum, checksum_of_rows, checksums, write_whole
from kvfold.convert.output.journal import refuse_other
from kvfold.convert.output.partial import RUN, Partial, partial_folder, refuse_existing, resumable
from kvfold.convert.output.record import RECORD
from kvfold.convert.pipeline import pick_device
from kvfold.convert.source.checkpoint import CheckpointReader, read_json
from kvfold.convert.source.configfile import read_config
from kvfold.convert.source.data import load_tokenizer, own_tokens, sample_from_source, sampled_at_once, several
from kvfold.convert.source.fetch import fetch_checkpoint
from kvfold.convert.source.opening import identity
from kvfold.errors import NothingGained, Stopped, UserError
from kvfold.evaluation.evaluate import load_model, recorded_source
from kvfold.recipes import rates
from kvfold.recipes.adapter import refuse_unadaptable
from kvfold.recipes.checkpoints import last_checkpoint, remove_damaged_checkpoints
from kvfold.recipes.data import Windows, evaluation_windows, pack, stamps, training_order
from kvfold.recipes.memory import needed_bytes, refuse_too_little
from kvfold.recipes.model import Folded, build, open_folded
from kvfold.recipes.recipe import Recipe
from kvfold.recipes.result import LOGS, entry_of, write_result
from kvfold.recipes.trainer import Log, Uptrainer, arguments

DATA = "data"


class Begun(BaseModel):
    """What an interrupted run says of itself: what was asked for, and checksums of the packed and the held-out text."""

    model_config = ConfigDict(extra="forbid")

    job: dict[str, Any]
    data: dict[str, str]
    held_out: str


@dataclass(frozen=True)
class Job:
    """What is asked for: the folded checkpoint, its teacher, recipe and texts."""

    folded: Folded
    teacher: Path | None
    recipe: Recipe
    data: str
    held_out: str | None
    out: Path

    @property
    def partial(self) -> Path:
        return partial_folder(self.out)

    @property
    def frozen(self) -> torch.dtype | None:
        """The dtype of what does not learn: its own where that can be, for it is never written."""
        # FSDP takes one dtype in a layer, and without autocast float32 meets nothing else.
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        return None if self.recipe.bf16 and not sharded else torch.float32

    def asked(self) -> dict[str, Any]:
        """What a resumed run must share with the one that began. The learning rate may be lowered on the way."""
        reader = self.folded.reader
        recipe = self.recipe.model_dump(exclude={"learning_rate", "device", "micro_batch", "log_every"})
        return {
            "version": kvfold.__version__,
            "design": {key: value for key, value in self.folded.plan.target().items() if key != "note"},
            "settings": {"teacher": self.teacher and str(self.teacher), "data": self.data, "eval": self.held_out, **recipe},
            "checkpoint files": {**identity(reader), RECORD: checksum(reader.folder / RECORD)},
            "teacher files": self.teacher and identity(CheckpointReader(self.teacher)),
            "text": stamps(self.data),
        }


def _silent(line: str) -> None:
    """What processes other than the first have to say."""


def uptrain(
    checkpoint: str,
    out: Path,
    teacher: str | None,
    recipe: Recipe,
    data: str,
    held_out: str | None = None,
    keep_adapter: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    log: Log = _silent,
) -> dict[str, Any]:
    """Train the folded `checkpoint` by a recipe and write the result to `out`, in the layout that it has.

    Args:
        teacher: the original, local folder or Hub id; None takes what kvfold.json names. Not read without KL.
        data, held_out: texts as `--calibrate` of convert takes them, `data` several with commas between.
        keep_adapter: write the adapter by itself in place of the merged checkpoint.
        log: called with a line at a time.

    Returns:
        The entry that was added to `uptraining` in kvfold.json: recipe, tokens seen, losses in nats per token.

    Raises:
        UserError: the checkpoint, teacher, recipe or text is unusable, too little memory, or `out` exists.
        ConversionError: the loss is not finite; `OUT.partial` keeps the last good checkpoint for `resume`.
        NothingGained: no step came below the held-out loss of `checkpoint`. Nothing is left.
        Stopped: SIGTERM came; `OUT.partial` keeps a checkpoint for `resume`.
    """
    started = time.time()
    if not resume:
        refuse_existing(out, overwrite)
    if Path(checkpoint).exists() and out.resolve() == Path(checkpoint).resolve():
        raise UserError(f"{out} is the folded checkpoint itself: choose another name")
    if keep_adapter and recipe.train != "lora":
        raise UserError(f"train={recipe.train} makes no adapter: leave --keep-adapter out, or take train=lora")
    device = pick_device(recipe.device)
    processes = PartialState(cpu=device.type == "cpu")
    folder = fetch_checkpoint(checkpoint)
    folded = open_folded(folder, teacher)
    original = fetch_checkpoint(teacher or recorded_source(folder)) if recipe.kl_weight else None
    job = Job(folded, original, recipe, data, held_out, out)
    refuse(job, processes, keep_adapter)

    holding = Partial(out, RUN, resume, overwrite) if processes.is_main_process else nullcontext()
    with holding as partial, resumable(job.partial):
        with processes.main_process_first():
            if partial is not None and not partial.finished:
                begin(job, partial, processes.device, log)
        if not (job.partial / RUN).exists():
            entry = read_json(out / RECORD)["uptraining"][-1]
            made, wanted = {**entry, **entry["recipe"]}, job.asked()["settings"]
            refuse_other(out, {"settings": {key: made.get(key) for key in wanted}}, {"settings": wanted})
            return entry
        if partial is None:
            log = _silent
        model = load_teacher(job, processes)
        job, tried = settle_rate(job, model, processes, log)
        trainer = make_trainer(job, model, processes, log)
        resumed = run(trainer, job, log)
        refuse_no_gain(trainer, job, bool(tried), partial, processes)
        entry = entry_of(job.recipe, trainer)
        entry |= {"rates_tried": tried} if tried else {}
        entry |= {"teacher": original and str(original), "data": data, "eval": held_out}
        entry |= {"resumed_from_step": resumed, "seconds": round(time.time() - started, 2)}
        del trainer
        if partial is not None:
            log("writing")
            base = str(Path(checkpoint).resolve()) if Path(checkpoint).exists() else checkpoint
            write_result(folded, entry, job.recipe, partial, base if keep_adapter else None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return entry


def refuse(job: Job, processes: PartialState, keep_adapter: bool) -> None:
    """Raise UserError for what cannot work, before any weight is read."""
    recipe, plan = job.recipe, job.folded.plan
    if recipe.batch % (recipe.micro_batch * processes.num_processes):
        raise UserError(
            f"batch={recipe.batch} does not divide into micro_batch={recipe.micro_batch} on {processes.num_processes} "
            "processes: change one of them"
        )
    listed = several(job.data, "--data")
    texts = [origin for origin in (*listed, job.held_out) if origin and ".safetensors" not in origin]
    if texts and recipe.window > plan.spec.max_positions:
        raise UserError(
            f"window={recipe.window} exceeds the {plan.spec.max_positions} positions that the source knows: "
            f"give window={plan.spec.max_positions}"
        )
    if job.teacher is None and any(own_tokens(origin, "--data", recipe.window, recipe.tokens) for origin in listed):
        raise UserError("--data self: the teacher would write it, and without kl_weight there is none: give a text")
    teacher = 0
    if job.teacher is not None:
        refuse_other_vocabulary(job.folded.reader.folder, job.teacher)
        teacher = sum(entry.size for entry in CheckpointReader(job.teacher).entries.values())
    trainee = build(job.folded, recipe, job.frozen, meta=True)
    if keep_adapter and plan.within:
        raise UserError(f"--keep-adapter is not possible within {plan.within}: leave it out, or convert with --part language")
    if keep_adapter:
        refuse_unadaptable(trainee)
    cpu = processes.device.type == "cpu"
    parts = needed_bytes(trainee, teacher, plan, recipe, recipe.window, cpu)
    refuse_too_little(parts, processes.device, processes.num_processes)


def refuse_other_vocabulary(student: Path, teacher: Path) -> None:
    """Raise UserError when the two do not read and write the same tokens."""
    remedy = "give the source that it was folded from, with --teacher"
    sizes = [read_config(folder).get("vocab_size") for folder in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{student} has {sizes[0]} tokens and the teacher {teacher} {sizes[1]}: {remedy}")
    try:
        words = [load_tokenizer(folder).get_vocab() for folder in (student, teacher)]
    except UserError:
        return  # one of them has no tokenizer, and the data will be tokens
    if words[0] != words[1]:
        raise UserError(f"the tokenizers of {student} and of the teacher {teacher} differ: {remedy}")


def begin(job: Job, partial: Partial, device: torch.device, log: Log) -> None:
    """Put the packed text into `partial`, or check what is there: damaged checkpoints go, damaged text is packed again.

    Raises UserError when what was begun was begun otherwise, or with other files or texts.
    """
    run, data = partial.folder / RUN, partial.folder / DATA
    asked = json.loads(json.dumps(job.asked()))
    begun = _read_begun(run) if partial.resumed else None
    if begun is not None:
        _refuse_other_design(partial.folder, begun.job.get("design"), asked["design"])
        refuse_other(partial.folder, begun.job, asked)
        remove_damaged_checkpoints(partial.folder)
    if begun is None or checksums(data) != begun.data:
        shutil.rmtree(data, ignore_errors=True)
        with tempfile.TemporaryDirectory() as own:
            texts = _with_own(job, Path(own), device, log)
            pack(texts, job.folded.reader.folder, job.recipe, job.folded.plan.spec.vocab_size, data)
    now = Begun(job=asked, data=checksums(data), held_out=checksum_of_rows(_read(job, 1)[1]))
    if begun is not None:
        refuse_other(partial.folder, _texts(begun), _texts(now))
    if now != begun:
        write_whole(run, now.model_dump_json(indent=2) + "\n")


def _with_own(job: Job, folder: Path, device: torch.device, log: Log) -> list[str]:
    """The texts to train on. What the teacher is to write, it writes into `folder` now: other text than the same seed gave to
    calibration."""
    recipe, texts = job.recipe, several(job.data, "--data")
    at_once = sampled_at_once(job.folded.plan.spec, recipe.window, device)
    for place, origin in enumerate(texts):
        if tokens := own_tokens(origin, "--data", recipe.window, recipe.tokens):
            assert job.teacher is not None  # or else it was refused
            written = sample_from_source(job.teacher, recipe.window, tokens, device, recipe.seed + 1, at_once, log)
            save_file({"text": written.ids}, folder / f"{place}.safetensors")
            texts[place] = f"{folder / str(place)}.safetensors:text"
    return texts


def _read_begun(run: Path) -> Begun:
    try:
        return Begun.model_validate_json(run.read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{run} is damaged: start anew with --overwrite in place of --resume") from None


def _texts(begun: Begun) -> dict[str, Any]:
    """The packed windows without what `datasets` says of them, which is of no moment and differs each time."""
    return {"text": {n: c for n, c in begun.data.items() if n.endswith(".arrow")}, "held-out text": begun.held_out}


def _refuse_other_design(folder: Path, begun: Any, wanted: dict[str, Any]) -> None:
    if isinstance(begun, dict) and begun != wanted:
        raise UserError(
            f"{folder} holds an adapter of another design ({_geometry(begun)}, the checkpoint has {_geometry(wanted)}): "
            "give the checkpoint that it was begun with, or start anew with --overwrite in place of --resume"
        )


def _geometry(design: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in design.items() if isinstance(value, (str, int)))


def _read(job: Job, processes: int) -> tuple[Windows, torch.Tensor]:
    """The windows in their order and the held-out ones."""
    recipe, folder, spec = job.recipe, job.folded.reader.folder, job.folded.plan.spec
    rows = datasets.load_from_disk(str(job.partial / DATA))
    training, held_out = evaluation_windows(job.held_out, rows, recipe, folder, spec.vocab_size, processes)
    length = len(rows[0]["input_ids"])
    for where, size in (("data", length), ("eval", held_out.shape[1])):
        if size > spec.max_positions:
            known = spec.max_positions
            raise UserError(f"--{where} has rows of {size} ids; the source knows {known} positions: give shorter ones")
    steps = math.ceil(recipe.tokens / (recipe.batch * length))
    return Windows(rows, training_order(training, steps, recipe.batch, recipe.seed)), held_out


def load_teacher(job: Job, processes: PartialState) -> PreTrainedModel | None:
    if job.teacher is None:
        return None
    return load_model(job.teacher, processes.device, "auto" if job.recipe.bf16 else "float32").requires_grad_(False)


def settle_rate(job: Job, teacher: PreTrainedModel | None, processes: PartialState, log: Log) -> tuple[Job, rates.Tried]:
    """The job with a number for its learning rate, and what was tried to find it, nothing where it was given."""
    if job.recipe.learning_rate != "auto":
        return job, []

    def at(rate: float) -> Job:
        return replace(job, recipe=job.recipe.model_copy(update={"learning_rate": rate}))

    def trial(rate: float) -> Uptrainer:
        return make_trainer(at(rate), teacher, processes, _silent, trial=True)

    tried = rates.try_rates(job.partial / rates.FILE, trial, log, keep=processes.is_main_process)
    return at(rates.best(tried)), tried


def make_trainer(
    job: Job, teacher: PreTrainedModel | None, processes: PartialState, log: Log, trial: bool = False
) -> Uptrainer:
    """A trainer of the checkpoint that was given. Several of them may have one teacher."""
    recipe = job.recipe
    windows, held_out = _read(job, processes.num_processes)
    cpu = processes.device.type == "cpu"
    args = arguments(recipe, job.partial, processes.num_processes, cpu, len(windows) // recipe.batch)
    kind: type[Uptrainer] = Uptrainer
    logs: Path | None = job.partial / LOGS
    if trial:
        rates.shorten(args)
        kind, logs = rates.Trial, None
    trainee = build(job.folded, recipe, job.frozen)
    learning, steps = sum(p.numel() for p in trainee.trained().values()), len(windows) // recipe.batch
    log(f"{len(windows):,} windows of {windows.window} ids in {steps} steps, {learning:,} parameters learn")
    return kind(trainee, teacher, windows, held_out, args, log, logs)


def run(trainer: Uptrainer, job: Job, log: Log) -> int:
    """Train to the end, from the last whole checkpoint on if there is one, and return the step of that, or 0.

    Raises Stopped when SIGTERM came.
    """
    last = last_checkpoint(job.partial)
    trainer.args.eval_on_start = last is None
    if last is not None:
        log(f"going on from {last}")
    with trainer.stop.listening():
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    state = trainer.state
    if state.global_step < state.max_steps:
        raise Stopped(f"stopped at step {state.global_step} of {state.max_steps}, saved: go on with --resume")
    return 0 if last is None else int(last.name.rpartition("-")[2])


def refuse_no_gain(trainer: Uptrainer, job: Job, auto: bool, partial: Partial | None, processes: PartialState) -> None:
    """Raise NothingGained when no step came below the checkpoint that was given. There is nothing to go on with then."""
    state, recipe = trainer.state, job.recipe
    if state.best_global_step:
        return
    if partial is not None:
        partial.discard()
    processes.wait_for_everyone()
    least = min(log["eval_loss"] for log in state.log_history if log.get("eval_loss") is not None and log["step"])
    raise NothingGained(
        f"held-out loss was {state.best_metric:.4f} before the first step and {least:.4f} at best in {state.max_steps} steps, "
        f"so nothing is written: lower learning_rate ({'auto found' if auto else 'now'} {recipe.learning_rate:g})"
        f"{'' if auto else ' or set it to auto'}, "
        f"give more tokens (now {recipe.tokens:,}), or text that is more like the held-out one"
    )
