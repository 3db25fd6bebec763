"""`kvfold evaluate`: any number of folded checkpoints against their source, on the same held-out windows."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import kvfold
from kvfold.convert import processes
from kvfold.convert.layouts import modeling_kvfold  # noqa: F401 — registers our layout with transformers
from kvfold.convert.output.record import RECORD, read_record
from kvfold.convert.pipeline import pick_device
from kvfold.convert.planning.settings import normal_dtype
from kvfold.convert.publishing.escape import visible
from kvfold.convert.source.configfile import read_config
from kvfold.convert.source.data import Windows, load_tokenizer, load_windows
from kvfold.convert.source.fetch import fetch_checkpoint
from kvfold.convert.source.model import load_causal
from kvfold.errors import ConversionError, UserError
from kvfold.evaluation import greedy, retrieval, speed, tasks
from kvfold.evaluation.damage import TokenScores, by_position, final_states, interval, position_edges, score
from kvfold.evaluation.layers import attention_errors, measure_cache
from kvfold.evaluation.schema import SCHEMA_VERSION
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.evaluation.unfinished import Unfinished, key_of

LAYER_ROWS, LAYER_TOKENS = 8, 4096
"""Windows on which the per-layer error is measured, and tokens of which they may be."""
Report = Callable[[float, str], None]


@processes.stopping_together()
def evaluate(
    models: Sequence[str],
    against: str | None,
    settings: EvaluateSettings,
    report: Report = lambda share, line: None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measure damage and gain of folded checkpoints.

    Under `accelerate launch` the windows are shared out over the processes; all of them return the same result.

    Args:
        models: local folders or Hub ids.
        against: the source; None takes what the first model's kvfold.json names.
        settings: text, windows, device, detail, tasks.
        report: called with the share of the work that is done and a line on what is going on.
        folder: where the report will lie. Results of finished models are kept there until it is written, and taken from
            there when an evaluation was interrupted.

    Returns:
        What `schema.Report` describes; NLL, KL and damage in nats per token, cache in numbers per token per layer and bytes
        per token.

    Raises:
        UserError: a checkpoint, the text or a task is unusable, or vocabularies or tokenizers differ.
    """
    device = pick_device(processes.join(settings.device, "repeat the command to go on"))
    folders = [fetch_checkpoint(model) for model in models]
    named = against or recorded_source(folders[0])
    source_folder = fetch_checkpoint(named)
    config = read_config(source_folder)
    for other in folders:
        _refuse_other_model(other, source_folder, config)
    tasks.check(settings.tasks, settings.include_path)
    windows = held_out_windows(settings, source_folder)
    for other in folders:
        _refuse_other_tokenizer(other, source_folder, windows)

    kept = processes.from_main(lambda: Unfinished(folder))
    decided = settings.model_dump() | {"version": kvfold.__version__, "windows": windows.ids.tolist()}
    keys = [key_of(decided, source_folder, other) for other in folders]
    missing = [number for number, key in enumerate(keys) if key not in kept.results]
    if missing:
        bench = Bench(named, source_folder, device, settings, windows, len(missing), report)
        for number in missing:
            try:
                measured = bench.measure(models[number], folders[number])
            except (UserError, ConversionError) as error:
                raise type(error)(f"{error}{_kept_so_far(keys, kept)}") from None
            kept.results[keys[number]] = {"source": bench.own, "model": measured}
            processes.from_main(kept.write)
            gc.collect()
    report(1.0, "done")
    rows, predicted = windows.ids.shape[0], windows.ids.shape[1] - 1
    return {
        "schema_version": SCHEMA_VERSION,
        "version": kvfold.__version__,
        "settings": settings.model_dump() | {"on": visible(settings.on)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "tokens": rows * predicted,
        "bytes_per_token": windows.bytes_per_token,
        "position_edges": position_edges(predicted),
        "source": kept.results[keys[0]]["source"],
        "models": [kept.results[key]["model"] for key in keys],
    }


def held_out_windows(settings: EvaluateSettings, source: Path) -> Windows:
    """The windows that models folded from `source` are measured on.

    Raises:
        UserError: as `load_windows`, and when windows are longer than the source knows positions.
    """
    config = read_config(source)
    if ".safetensors" not in settings.on:
        _refuse_beyond(config, settings.window, f"--window {settings.window}", "give --window {}")
    windows = load_windows(settings.on, source, settings.window, settings.max_tokens, config["vocab_size"], overlap=1)
    length = windows.ids.shape[1]
    _refuse_beyond(config, length, f"{settings.on} has rows of {length} ids, which", "give rows of {} or fewer")
    return windows


class Bench:
    """The source, loaded and measured once, against which models are measured one after the other.

    Attributes:
        own: what was measured on the source itself.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        device: torch.device,
        settings: EvaluateSettings,
        windows: Windows,
        models: int,
        report: Report,
    ) -> None:
        self.device, self.settings, self.windows, self.report = device, settings, windows, report
        self.parts, self.part = models + 1, 0
        self.batches = windows.ids.split(settings.batch)
        self.source = load_model(folder, device, settings.dtype)
        self.reference: dict[int, Tensor] = {}
        """The source's final states of the batches that this process has, on the CPU: 4·d bytes per token."""
        self.scores = self._score(self.source, folder.name)
        self.answers, floor = self._ask(folder)
        self.own = {"path": visible(name), "greedy": floor, **self._common(self.source, folder, self.scores)}

    def measure(self, name: str, folder: Path) -> dict[str, Any]:
        """Everything that the report says of one folded model."""
        self.part += 1
        model = load_model(folder, self.device, self.settings.dtype)
        scores = self._score(model, folder.name)
        damage = scores.nll - self.scores.nll
        conversion = _conversion(folder)
        found = {
            "path": visible(name),
            "greedy": None if self.answers is None else greedy.compare(model, self.answers),
            **self._common(model, folder, scores),
            "damage_nats": scores.mean_nll - self.scores.mean_nll,
            "damage_interval": interval(damage),
            "kl": scores.mean_kl,
            "kl_interval": interval(scores.kl),
            "top1_agreement": scores.top1_agreement,
            "top1_interval": interval(scores.agrees),
            "damage_by_position": by_position(damage, position_edges(damage.shape[1])),
            "attention_errors": processes.from_main(lambda: attention_errors(self.source, model, self._layer_rows())),
            "stage": stage_of(conversion),
            "conversion": conversion,
        }
        return found

    def _ask(self, folder: Path) -> tuple[greedy.Answers | None, dict[str, Any] | None]:
        """The source's greedy answers, and how far it follows them itself in another dtype."""
        if self.settings.detail == "damage":
            return None, None
        self._progress(0.5, f"{folder.name}: greedy answers")
        grid = greedy.GRIDS[self.settings.detail]
        answers = greedy.ask(self.source, folder, self.windows.ids, grid, self.settings.batch)
        if answers is None:
            return None, None
        other = "bfloat16" if self.source.dtype == torch.float32 else "float32"
        try:
            return answers, greedy.compare(load_model(folder, self.device, other), answers)
        except (ConversionError, torch.OutOfMemoryError):  # float32 takes twice what the user found room for
            return answers, None

    def _layer_rows(self) -> Tensor:
        ids = self.windows.ids
        return ids[: max(1, min(LAYER_ROWS, LAYER_TOKENS // ids.shape[1]))]

    def _score(self, model: PreTrainedModel, name: str) -> TokenScores:
        def work(number: int, ids: Tensor) -> TokenScores:
            self._progress(0.5 * number / len(self.batches), name)
            states = final_states(model, ids, len(ids))
            reference = self.reference.setdefault(number, states)
            return score(self.source, reference, model, states, ids)

        return TokenScores.joined(processes.spread(self.batches, work))

    def _common(self, model: PreTrainedModel, folder: Path, scores: TokenScores) -> dict[str, Any]:
        ids, detail, asked = self.windows.ids, self.settings.detail, self.settings.tasks
        prompt = ids[:1, : max(2, ids.shape[1] // 2)]
        numbers, size = measure_cache(model, prompt)
        needles, decoding = None, []
        if detail != "damage":
            self._progress(0.6, f"{folder.name}: needles")
            needles = retrieval.find_needles(model, ids, retrieval.GRIDS[detail])
            self._progress(0.75, f"{folder.name}: decoding")
            decoding = processes.from_main(lambda: speed.measure_speed(model, ids.shape[1], speed.GRIDS[detail], size))
        self._progress(0.85, f"{folder.name}: {', '.join(asked)}")
        settings = self.settings
        return {
            "nll": scores.mean_nll,
            "perplexity": scores.perplexity(),
            "bits_per_byte": scores.bits_per_byte(self.windows.bytes_per_token),
            "cache_numbers_per_token_per_layer": numbers,
            "cache_bytes_per_token": size,
            "parameters": model.num_parameters(),
            "needles": needles,
            "speed": decoding,
            "tasks": processes.from_main(
                lambda: tasks.run(model, folder, asked, settings.include_path, settings.limit, settings.batch)
            ),
        }

    def _progress(self, share: float, line: str) -> None:
        self.report((self.part + share) / self.parts, line)


def stage_of(conversion: dict[str, Any] | None) -> str:
    """How far a model came: folded in closed form, healed layer by layer, or uptrained end to end."""
    if conversion is None:
        return "unknown"
    if conversion.get("uptraining"):
        return "uptrained"
    settings = conversion["settings"]
    return "healed" if settings.get("calibrate") and settings.get("heal_steps") else "closed form"


def _refuse_beyond(config: dict[str, Any], length: int, what: str, remedy: str) -> None:
    """Raise UserError when windows are longer than the source knows positions."""
    limit = config.get("max_position_embeddings")
    if limit is not None and length > limit:
        raise UserError(f"{what} exceeds the {limit} positions that the source knows: {remedy.format(limit)}")


def _refuse_other_model(folder: Path, source: Path, config: dict[str, Any]) -> None:
    other = read_config(folder)
    for key in ("vocab_size", "num_hidden_layers", "hidden_size"):
        if other.get(key) != config.get(key):
            raise UserError(
                f"{folder} has {key} {other.get(key)}, {source} has {config.get(key)}: "
                "give the source that it was folded from, with --against"
            )


def _refuse_other_tokenizer(folder: Path, source: Path, windows: Windows) -> None:
    """Raise UserError when both have a tokenizer and they read the evaluated text differently."""
    files = [path / "tokenizer.json" for path in (source, folder)]
    if not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = load_tokenizer(source), load_tokenizer(folder)
    texts = ours.batch_decode(windows.ids[:4].tolist())
    if ours.get_vocab() != theirs.get_vocab() or ours(texts)["input_ids"] != theirs(texts)["input_ids"]:
        raise UserError(
            f"{folder} and {source} have different tokenizers: copy the source's tokenizer files there, or give the source "
            "that it was folded from, with --against"
        )


def _kept_so_far(keys: Sequence[str], kept: Unfinished) -> str:
    done = sum(key in kept.results for key in keys)
    if not done or kept.file is None:
        return ""
    return f"; {done} of {len(keys)} models are measured and kept in {kept.file}: repeat the command to go on"


def load_model(folder: Path, device: torch.device, dtype: str) -> PreTrainedModel:
    """A checkpoint in transformers, `dtype` "auto" for its own. Raises UserError when it does not load."""
    if read_config(folder).get("model_type") == "step3_text":
        raise UserError(
            f"{folder} is a step3_text checkpoint, which vLLM runs and transformers does not: measure the same fold "
            "with --layout kvfold"
        )
    transformers_logging.disable_progress_bar()  # ours says more
    chosen = dtype if dtype == "auto" else getattr(torch, str(normal_dtype(dtype)))
    try:
        model, missing = load_causal(folder, dtype=chosen)
        if missing:  # transformers makes them up
            raise UserError(f"{folder} lacks {', '.join(missing[:3])}{' …' * (len(missing) > 3)}: convert or copy it again")
        return cast(Any, model).to(device).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ConversionError(f"{folder} does not fit on {device} ({error}): use --dtype bf16 or another --device") from None


def recorded_source(folder: Path) -> str:
    """What kvfold.json names as the source. Raises UserError when there is none."""
    record = _conversion(folder)
    if record is None:
        raise UserError(f"{folder} has no {RECORD} that names its source: give it with --against")
    return str(record["source"])


def _conversion(folder: Path) -> dict[str, Any] | None:
    """What kvfold.json says of the conversion, without the per-layer log."""
    if not (folder / RECORD).exists():
        return None
    record = read_record(folder, "", "convert again, or remove it and give --against")
    kept = {key: record[key] for key in ("source", "settings", "target", "kv_budget", "calibration_tokens", "seconds")}
    return kept | {"uptraining": record.get("uptraining") or []}
