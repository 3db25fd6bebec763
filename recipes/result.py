"""What an uptraining leaves behind: a checkpoint or an adapter, and its entry in kvfold.json."""

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerState

import kvfold
from kvfold.convert.output.partial import JOURNAL, Partial
from kvfold.convert.output.record import RECORD, peak_memory
from kvfold.convert.output.writer import CheckpointWriter
from kvfold.convert.planning.settings import parse_size
from kvfold.convert.source.sidefiles import side_files
from kvfold.recipes.adapter import write_adapter
from kvfold.recipes.model import Folded, build, write_folded
from kvfold.recipes.recipe import Recipe

if TYPE_CHECKING:
    from kvfold.recipes.trainer import Uptrainer

TRAINED, LOGS = "trained.safetensors", "runs"


def entry_of(recipe: Recipe, trainer: "Uptrainer") -> dict[str, Any]:
    """What kvfold.json says of an uptraining: losses in nats per token, `curve` as [tokens, loss].

    `best_step` is 0 and `held_out_loss` the same before and after when no step came below the checkpoint that was given.
    """
    state: TrainerState = trainer.state
    window = trainer.held_out.shape[1]
    tokens_per_step = recipe.batch * trainer.windows.window
    held_out = [
        {"tokens": log["step"] * tokens_per_step, **{key: log[f"eval_{key}"] for key in ("loss", "kl", "ce")}}
        for log in state.log_history
        if "eval_loss" in log
    ]
    entry = {
        "version": kvfold.__version__,
        "recipe": recipe.model_dump(),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "tokens": state.global_step * tokens_per_step,
        "distinct_tokens": len(set(trainer.windows.order)) * trainer.windows.window,
        "held_out_tokens": len(trainer.held_out) * (window - 1),
        "parameters_trained": sum(p.numel() for p in trainer.trainee.trained().values()),
        "held_out_loss": {"before": held_out[0]["loss"], "after": state.best_metric},
        "held_out": held_out,
        "curve": [[log["step"] * tokens_per_step, log["loss"]] for log in state.log_history if "loss" in log],
        "peak_memory_bytes": peak_memory(),
    }
    if trainer.args.device.type == "cuda":
        entry["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.args.device)
    return entry


def write_result(folded: Folded, entry: dict[str, Any], recipe: Recipe, partial: Partial, base: str | None) -> None:
    """Write the best step of the run in `partial`, in the layout of `folded`, and give it its name.

    Args:
        entry: is added to `uptraining` in kvfold.json.
        base: the name of the folded checkpoint, to write an adapter of it; None merges adapters into the checkpoint.
    """
    trainee = build(folded, recipe, None)
    trainee.load(load_file(partial.folder / f"checkpoint-{entry['best_step']}" / TRAINED))
    folder, target = folded.reader.folder, partial.folder / "result"
    shutil.rmtree(target, ignore_errors=True)
    record = {**folded.record, "uptraining": [*folded.record.get("uptraining", []), entry]}
    texts = {RECORD: json.dumps(record, indent=2) + "\n"}
    side = side_files(folder)
    if base is not None:
        target.mkdir()  # no config.json in it: that would make it a model to transformers
        write_adapter(folded, trainee, base, target)
        (target / RECORD).write_text(texts[RECORD])
        for file in side.copies:
            shutil.copyfile(file, target / file.name)
    else:
        causal = trainee.student.causal
        changed = [name.removeprefix("causal.") for name in trainee.trained()]
        if trainee.adapters is not None:
            trainee.adapters.merge_and_unload()
        shard = parse_size(folded.plan.settings.max_shard_size)
        with Partial(target, JOURNAL, overwrite=True) as inner, CheckpointWriter(inner, folded.specs(), shard, {}) as writer:
            write_folded(folded, causal, changed, writer)
            reader = folded.reader
            config = {**(reader.config if reader.view is None else reader.view.raw), "auto_map": folded.layout.code()}
            if not config["auto_map"]:
                del config["auto_map"]
            texts["config.json"] = json.dumps(config, indent=2) + "\n"
            writer.commit({**side.texts, **folded.layout.files(), **texts}, side.copies)
    if (partial.folder / LOGS).is_dir():
        shutil.copytree(partial.folder / LOGS, target / LOGS)
    partial.give_name(target)
