"""config.json as transformers' own class reads it: its defaults, its precedence of old and new keys, its kinds of layers.

kvfold takes that class's word for what a source is. What the class lets through but no attention here can be, is refused.
"""

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvfold.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


KERNELS = ("_attn_implementation", "attn_implementation", "_attn_implementation_autoset")
"""What some configs say of whoever saved them: which kernels their machine had."""


ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
"""The usual ones, which transformers has; whether it has another one cannot be asked without torch."""


class ConfigFile(BaseModel):
    """Sizes that decide how much is allocated, far above those of any model, and numbers that would spoil every other."""

    model_config = ConfigDict(strict=True, extra="ignore")

    hidden_size: int = Field(ge=1, le=10**6)
    num_attention_heads: int = Field(ge=1, le=10**5)
    num_hidden_layers: int = Field(ge=1, le=1000)
    vocab_size: int = Field(ge=1, le=10**8)
    num_key_value_heads: int | None = Field(None, ge=1, le=10**5)
    head_dim: int | None = Field(None, ge=1, le=10**5)
    intermediate_size: int = Field(1, ge=1, le=10**8)
    max_position_embeddings: int = Field(1, ge=1)
    sliding_window: int | None = Field(None, ge=1)
    rms_norm_eps: float = Field(0.0, ge=0, allow_inf_nan=False)
    tie_word_embeddings: bool = False
    num_labels: int | None = Field(None, ge=0, le=10**5)


def config_of(config: dict[str, Any]) -> "PreTrainedConfig":
    """transformers' config of a config.json, without the code that it may name.

    Raises:
        UserError: a key is missing or of the wrong type, a number is impossible, or transformers does not take it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    _check_sizes(config)
    told = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map", *KERNELS)}
    try:
        with silent():
            kind = CONFIG_MAPPING[config["model_type"]]
            _refuse_covered(told, kind)
            read = kind.from_dict(copy.deepcopy(told))
            _refuse_unread(read)
            return read
    except Exception as error:  # checks of many kinds, of transformers and of the Hub's client alike
        raise UserError(f"transformers does not take config.json ({_line(error)}): check that file") from None


@contextmanager
def silent() -> Iterator[None]:
    """Without what transformers would log of a config: what is wrong with it is told once, by kvfold."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_covered(told: dict[str, Any], kind: type["PreTrainedConfig"]) -> None:
    """Raise ValueError for a key that would cover what its class has beside its fields: methods, plans of devices, names."""
    for key in told.keys() - {field.name for field in fields(kind)}:
        held = inspect.getattr_static(kind, key, told[key])
        if not isinstance(held, property) and getattr(kind, key, told[key]) != told[key]:
            raise ValueError(f"{key} is {told[key]!r:.40}, where {kind.__name__} has something of its own: take it out")


def _refuse_unread(config: "PreTrainedConfig") -> None:
    """Raise ValueError for what the config class takes, and the model's class would stumble over or read otherwise."""
    if config.get_text_config() is not config:
        raise ValueError("it holds the config of another model, as text_config or the like")
    if getattr(config, "head_dim", 0) is None and not hasattr(type(config), "head_dim"):
        raise ValueError("head_dim is null, where it has to be a number or left out")
    for name in (field.name for field in fields(config) if "drop" in field.name or field.name.endswith("_noise")):
        share = getattr(config, name)
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}, which is no share between 0 and 1")
    acts = (getattr(config, key, None) for key in ("hidden_act", "hidden_activation"))
    for act in (act for act in acts if act is not None and act not in ACTIVATIONS):
        from transformers.activations import ACT2FN

        if act not in ACT2FN:
            raise ValueError(f"it has no activation {act!r:.40}")


def resolve(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with every default of transformers' class written out, and the keys of older versions in their new places.

    Raises UserError as `config_of` does, and for a model whose attention is none that kvfold folds.
    """
    read = config_of(config)
    refuse_strange(read)
    return read.to_dict()


def refuse_strange(config: "PreTrainedConfig") -> None:
    """Raise UserError for what a known family's config can say and its folded attention cannot."""
    said: dict[str, Any] = config.to_dict()
    pad, vocab = said.get("pad_token_id"), said["vocab_size"]
    if isinstance(pad, int) and not -vocab <= pad < vocab:  # its row of the embedding is kept at zero
        raise UserError(f"config.json: pad_token_id {pad} is no token of a vocabulary of {vocab}: check that file")
    rope = said.get("rope_parameters") or {}
    kinds = {kind: value for kind, value in rope.items() if isinstance(value, dict)}
    found = {
        "its attention is not causal (is_causal is false), an embedding model's: fold the one that it was made from": said.get(
            "is_causal"
        )
        is False
        or bool(said.get("use_bidirectional_attention")),
        "its layers have different geometry (per_layer_config)": bool(getattr(config, "is_heterogeneous", False)),
        "its kinds of layers differ in their RoPE": bool(kinds) and "full_attention" not in kinds,
        "queries and keys go through norms of each head's own (qk_layernorm)": bool(said.get("qk_layernorm")),
        "it attends in chunks (attention_chunk_size)": said.get("attention_chunk_size") is not None,
        "it names other weight files (transformers_weights)": said.get("transformers_weights") is not None,
    }
    reasons = [reason for reason, there in found.items() if there]
    if reasons:
        raise UserError(f"config.json describes a model that kvfold does not fold: {'; '.join(reasons)}")
    for layer_type, parameters in kinds.items() or [(None, rope)]:
        _check_rope(config, parameters, {} if layer_type is None else {"layer_type": layer_type})


def _check_rope(config: "PreTrainedConfig", rope: dict[str, Any], layers: dict[str, str]) -> None:
    """Raise UserError when transformers has no such RoPE, or its frequencies are no numbers; `layers` names a kind of layer."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 < theta < math.inf:
        raise UserError(f"config.json: rope_theta is {theta!r:.40}, which is no base of a RoPE: check that file")
    if not isinstance(kind, str) or (kind != "default" and kind not in ROPE_INIT_FUNCTIONS):
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise UserError(f"config.json: rope type {kind!r:.40} is none that transformers knows ({known}): check that file")
    if plain_rope(rope):
        return
    try:
        sound = bool(ROPE_INIT_FUNCTIONS[kind](config, device="cpu", **layers)[0].isfinite().all())
    except Exception as error:  # arithmetic with whatever stands there
        raise UserError(f"config.json: rope_parameters do not fit type {kind} ({_line(error)}): check that file") from None
    if not sound:
        raise UserError(f"config.json: rope_parameters give frequencies that are no numbers ({rope}): check that file")


def plain_rope(rope: dict[str, Any]) -> bool:
    """Whether frequencies are finite whatever the config says beside these parameters: the usual types, with usual numbers."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return True
    if kind not in ("linear", "llama3") or rope.get("partial_rotary_factor") is not None:
        return False
    named = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings") if kind == "llama3" else ()
    numbers = [rope.get(name) for name in ("rope_theta", "factor", *named)]
    if not all(type(n) in (int, float) and 1 <= n <= 1e12 for n in numbers):  # type: ignore[operator]
        return False
    return kind == "linear" or rope["low_freq_factor"] < rope["high_freq_factor"]


def _check_sizes(config: dict[str, Any]) -> None:
    try:
        unused = ("sliding_window",) if config.get("use_sliding_window") is False else ()  # Qwen2-MoE writes 0
        ConfigFile.model_validate({key: value for key, value in config.items() if key not in unused})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            raise UserError(f"config.json lacks {name!r}: it is not a complete {config.get('model_type')} config") from None
        raise UserError(
            f"config.json: {name} is {first['input']!r:.40}, which is no valid geometry ({first['msg'].lower()}): "
            "download it again"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
