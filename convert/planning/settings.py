"""What a user can set for a conversion, and how what they wrote is read."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvfold.errors import UserError

TARGETS = ("gqa", "mqa", "mla", "mfa", "mfa-kr", "source")
LATENT_TARGETS = ("mla", "mfa", "mfa-kr")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "f32": "float32", "half": "float16"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


TARGET, CALIBRATION, HEALING, OUTPUT = "Target", "Calibration", "Healing", "Output"
"""Panels of `--help`."""


def setting(default: Any, panel: str, help: str, **limits: Any) -> Any:
    """A field of a settings model, from which its option on the command line is made."""
    return Field(default, description=help, json_schema_extra={"panel": panel}, **limits)


MOST_TEXT = 8
"""Times the calibration tokens that healing reads at most: their hidden states are kept."""


class ConvertSettings(BaseModel):
    """Everything that decides what a conversion writes. Recorded in kvfold.json, and readable from there."""

    model_config = ConfigDict(extra="forbid")

    to: str = setting(
        ..., TARGET, "Target attention: gqa, mqa, mla, mfa or mfa-kr; source folds nothing and translates what needs it."
    )
    part: Literal["all", "language"] = setting(
        "all", TARGET, "language takes the language model out of a model of several parts, and writes it alone."
    )
    kv_heads: int | None = setting(None, TARGET, "Key/value heads to keep (gqa).")
    kv_rank: int | None = setting(None, TARGET, "Width of the latent (mla).")
    rope_dim: int | None = setting(None, TARGET, "Width of the shared rotary key (mla). Default: the head width, at most 64.")
    width: int | None = setting(None, TARGET, "Width of the one key, and of the one value of mfa (mfa, mfa-kr).")
    q_rank: int | None = setting(None, TARGET, "Rank of the queries (mla, mfa, mfa-kr). Default: full.", ge=1)
    kv_budget: Annotated[str | None, BeforeValidator(lambda v: str(v) if isinstance(v, float) else v)] = setting(
        None, TARGET, "Share of the folded layers' cache to keep, 25% or 0.25, in place of the target's widths."
    )
    keys: Literal["absorbed", "rebuilt"] = setting(
        "absorbed", TARGET, "rebuilt is mla without rotary key, milder, but decoding rebuilds all keys at every step."
    )
    turned_keys: int | None = setting(
        None, TARGET, "Keys that turn whole beside the shared rotary one (mla, own layout). Default: 3; 0 decodes faster.", ge=0
    )
    key_norm: Literal["cached", "mean"] = setting(
        "cached", TARGET, "Sizes of normed keys: cached for each token, or the mean, which is not exact and costs no cache."
    )
    biases: Literal["kept", "regressed"] = setting(
        "kept",
        TARGET,
        "Biases of queries, keys and values; regressed reads them off the input, which is not exact, for deepseek_v3 (mla).",
    )
    layers: Annotated[str | None, BeforeValidator(lambda v: str(v) if isinstance(v, int) else v)] = setting(
        None,
        TARGET,
        "Layers to fold: all, full (attending over everything), or numbers, 0-3,7. Default: full where some are.",
    )
    layer_budgets: Literal["uniform", "measured"] = setting(
        "uniform", TARGET, "measured keeps the same total, and gives more where a layer needs it (mla, mfa, mfa-kr)."
    )
    layout: Literal["auto", "deepseek_v3", "step3_text", "kvfold"] = setting(
        "auto", TARGET, "How it is written; auto is what transformers runs, stock first. step3_text is for vLLM only."
    )
    pad_for: Literal["vllm", "vllm-cpu", "none"] | None = setting(
        None, TARGET, "Zero-pad mla for an engine's kernels. Default: where the cache does not grow."
    )
    method: str | None = setting(
        None,
        TARGET,
        "mean, first, random, align or pca; for mla kvfold or, to compare, svd-split, svd-joint, partial-rope-high, -low, "
        "-uniform, -2norm, rorope, whitened. Default: pca with calibration text, align without; kvfold for mla.",
    )
    grouping: Literal["neighbours", "similar"] | None = setting(
        None, TARGET, "Which heads share one. Default: similar for align and pca, else neighbours."
    )
    calibrate: str | None = setting(
        None,
        CALIBRATION,
        "Text file, folder, Hub dataset name[:config[:split[:column]]], tokens file.safetensors:name, or self[:tokens] to "
        "let the source write it; several with commas.",
    )
    calibration_tokens: int = setting(131072, CALIBRATION, "Tokens to fold layers on, alike of several texts.", gt=0)
    window: int = setting(512, CALIBRATION, "Tokens in a window of calibration text.", ge=2)
    token_weights: Literal["uniform", "nll"] = setting(
        "uniform", CALIBRATION, "How much a token counts; nll: by what the source finds surprising."
    )
    heal_steps: int = setting(300, HEALING, "Steps, of all layers or of each window; 0 turns healing off.", ge=0)
    heal_window: Annotated[int, Field(ge=1)] | Literal["auto", "all"] = setting(
        "auto", HEALING, "Layers healed together; auto is all of a deep model that fits into memory, else 2."
    )
    heal_batch_tokens: int = setting(2048, HEALING, "Tokens in a step.", ge=1)
    heal_lr: float | None = setting(
        None, HEALING, "Step relative to a parameter's RMS. Default: 0.03/√d for all layers, 0.02 for windows.", gt=0, le=1e6
    )
    heal_dtype: Literal["bfloat16", "float32"] = setting("bfloat16", HEALING, "Of the matrix products.")
    dtype: str | None = setting(None, OUTPUT, "float32, bfloat16 or float16. Default: as the source.")
    device: str = setting("auto", OUTPUT, "auto, cpu, cuda or cuda:N.")
    max_shard_size: str = setting("5GB", OUTPUT, "Size of a weight file, 5GB or 500MiB.")
    seed: int = setting(0, OUTPUT, "Of whatever is drawn.", ge=0, lt=2**32)
    revision: str | None = setting(None, OUTPUT, "Branch, tag or commit of the source on the Hub.")

    @property
    def more_tokens(self) -> int:
        """Tokens behind the calibration tokens that healing all layers at once has steps for, where the text has them."""
        if isinstance(self.heal_window, int):
            return 0
        wanted = min(self.heal_steps * self.heal_batch_tokens, MOST_TEXT * self.calibration_tokens)
        return max(0, wanted - self.calibration_tokens)


Settings = TypeVar("Settings", bound=BaseModel)


def parse_settings(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Check settings. Raises UserError naming all that is wrong at once."""
    try:
        return kind(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                problems.append(unknown("setting", name, list(kind.model_fields)))
            elif problem["type"] == "missing":
                remedy = f": give --to {' or --to '.join(TARGETS)}" if name == "to" else ""
                problems.append(f"--{name.replace('_', '-')} is missing{remedy}")
            else:
                problems.append(f"{name}: {problem['msg'].lower()}, got {problem['input']!s:.80}")
        raise UserError("; ".join(problems)) from None


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: no settings need them, and nested ones grow without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name)")
        return super().compose_node(parent, index)


def parse_yaml(text: str, where: str) -> Any:
    """Settings in YAML. Raises UserError with `where` when it is none, or nested too deeply."""
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader: no tag makes an object
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}") from None


def read_settings(path: Path | None) -> dict[str, Any]:
    """Settings from YAML, JSON or a kvfold.json; none for None. Raises UserError when it holds none."""
    if path is None:
        return {}
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"), f"--settings {path}")
    except (OSError, ValueError) as error:
        raise UserError(f"--settings {path} cannot be read: {' '.join(str(error).split())}") from None
    if isinstance(loaded, dict):
        loaded = loaded.get("settings", loaded)  # a kvfold.json keeps them one level down
    if not isinstance(loaded, dict):
        raise UserError(f"--settings {path} holds no settings: write `name: value` lines")
    return loaded


def parse_budget(text: str) -> float:
    """`25%` or `0.25` → 0.25. Raises UserError outside (0, 1]."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(%?)\s*", text)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise UserError(f"--kv-budget {text} is no share of the source's cache: write 25% or 0.25")
    return value


def parse_size(text: str | None) -> int:
    """`5GB`, `500MiB`, `1000000` → bytes. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B?)\s*", str(text).upper())
    if not match or match[2] not in _UNITS or not 0 < float(match[1]) < 1e18:
        raise UserError(f"{text!s:.60} is no size: write 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def normal_dtype(text: str | None) -> str | None:
    """`bf16` → `bfloat16`, and so on. Raises UserError for an unknown dtype."""
    if text is None:
        return None
    name = DTYPE_ALIASES.get(text.lower(), text.lower())
    if name not in DTYPE_BYTES:
        raise UserError(unknown("dtype", text, [*DTYPE_BYTES, "bf16", "fp16", "fp32"]))
    return name


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """`unknown method 'pac'. Did you mean pca? Available: …`"""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}. " + (f"Did you mean {close[0]}? " if close else "") + f"Available: {', '.join(known)}"
