"""`kvfold evaluate`: any number of folded checkpoints against their source, on the same held-out windows."""

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import kvfold
from kvfold.convert.checkpoint import read_config
from kvfold.convert.data import Windows, load_windows
from kvfold.convert.pipeline import RECORD, pick_device
from kvfold.convert.plan import normal_dtype
from kvfold.convert.source import fetch_checkpoint
from kvfold.errors import ConversionError, UserError
from kvfold.evaluation.damage import TokenScores, final_states, score
from kvfold.evaluation.layers import attention_errors, measure_cache

LAYER_ROWS = 8
"""Windows on which the per-layer error is measured."""


class EvaluateSettings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    on: str
    window: int = Field(512, ge=2)
    max_tokens: int = Field(65536, gt=0)
    batch: int = Field(8, ge=1)
    device: str = "auto"
    dtype: str = "float32"


def evaluate(
    models: Sequence[str],
    against: str | None,
    settings: EvaluateSettings,
    report: Callable[[float, str], None] = lambda share, line: None,
) -> dict[str, Any]:
    """Measure damage and gain of folded checkpoints.

    Args:
        models: local folders or Hub ids.
        against: the source; None takes what the first model's kvfold.json names.
        settings: text, windows, device.
        report: called with the share of the work that is done and a line on what is going on.

    Returns:
        `{"version", "settings", "source": {…}, "models": [{"path", "nll", "damage_nats", "kl", "top1_agreement", …}]}`;
        NLL, KL and damage in nats per token, cache in numbers per token per layer and bytes per token.

    Raises:
        UserError: a checkpoint or the text is unusable, or the vocabularies differ.
    """
    folders = [fetch_checkpoint(model) for model in models]
    source_folder = fetch_checkpoint(against or recorded_source(folders[0]))
    config = read_config(source_folder)
    for folder in folders:
        other = read_config(folder)
        for key in ("vocab_size", "num_hidden_layers", "hidden_size"):
            if other.get(key) != config.get(key):
                raise UserError(
                    f"{folder} has {key} {other.get(key)}, {source_folder} has {config.get(key)}: "
                    "give the source that it was folded from, with --against"
                )
    device = pick_device(settings.device)
    windows = load_windows(settings.on, source_folder, settings.window, settings.max_tokens, config["vocab_size"])
    steps = len(folders) + 1

    def part(number: int, line: str) -> Callable[[float], None]:
        return lambda share: report((number + share) / steps, line)

    source = load_model(source_folder, device, settings.dtype)
    reference = final_states(source, windows.ids, settings.batch, part(0, "source"))
    scores = score(source, reference, source, reference, windows.ids)
    result: dict[str, Any] = {
        "version": kvfold.__version__,
        "settings": settings.model_dump(),
        "tokens": scores.nll.numel(),
        "bytes_per_token": windows.bytes_per_token,
        "source": {"path": str(source_folder), **_common(source, scores, windows)},
        "models": [],
    }
    for number, folder in enumerate(folders, 1):
        model = load_model(folder, device, settings.dtype)
        folded = final_states(model, windows.ids, settings.batch, part(number, folder.name))
        own = score(source, reference, model, folded, windows.ids)
        errors = attention_errors(source, model, windows.ids[:LAYER_ROWS])
        result["models"].append(
            {
                "path": str(folder),
                **_common(model, own, windows),
                "damage_nats": own.mean_nll - scores.mean_nll,
                "kl": own.mean_kl,
                "top1_agreement": own.top1_agreement,
                "attention_errors": errors,
                "conversion": _conversion(folder),
            }
        )
        del model
        gc.collect()
    report(1.0, "done")
    return result


def _common(model: PreTrainedModel, scores: TokenScores, windows: Windows) -> dict[str, Any]:
    numbers, size = measure_cache(model, windows.ids[:1, : max(2, windows.ids.shape[1] // 2)])
    return {
        "nll": scores.mean_nll,
        "perplexity": scores.perplexity(),
        "bits_per_byte": scores.bits_per_byte(windows.bytes_per_token),
        "cache_numbers_per_token_per_layer": numbers,
        "cache_bytes_per_token": size,
        "parameters": model.num_parameters(),
    }


def load_model(folder: Path, device: torch.device, dtype: str) -> PreTrainedModel:
    """A checkpoint in transformers, `dtype` "auto" for its own. Raises UserError when it does not load."""
    transformers_logging.disable_progress_bar()  # ours says more
    chosen = dtype if dtype == "auto" else getattr(torch, str(normal_dtype(dtype)))
    try:
        # sdpa, because per-layer errors are taken without a mask and eager attention would then not be causal
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, attn_implementation="sdpa")
    except torch.OutOfMemoryError as error:
        raise ConversionError(f"{folder} does not fit on {device} ({error}): use --dtype bf16 or another --device") from None
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} does not load in transformers: {str(error).strip().splitlines()[0]}") from None
    return model.to(device).eval()  # type: ignore[arg-type]


def recorded_source(folder: Path) -> str:
    """What kvfold.json names as the source. Raises UserError when there is none."""
    record = _conversion(folder)
    if record is None:
        raise UserError(f"{folder} has no {RECORD} that names its source: give it with --against")
    return str(record["source"])


def _conversion(folder: Path) -> dict[str, Any] | None:
    """What kvfold.json says of the conversion, without the per-layer log."""
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        return {key: record[key] for key in ("source", "settings", "target", "kv_budget", "calibration_tokens", "seconds")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): convert again, or remove it and give --against") from None
