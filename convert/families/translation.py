"""How a family under another name is read as one of transformers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what reads a config does without
    from torch import Tensor

Cut = Callable[["Tensor"], "Tensor"]
"""What makes a tensor of one that is stored. Biases are cut like the rows that they belong to."""
Cuts = Mapping[str, Mapping[str, Cut]]


@dataclass(frozen=True)
class Translation:
    """A family under another name.

    Attributes:
        model_type, architecture: what its config.json calls itself.
        into: the `model_type` of the family that it is.
        keys: from its config.json, what the family's config wants beside `SHARED`. Raises UserError for what that cannot say.
        names: parts of the names of its tensors, between dots → what they are called in the family.
        cuts: from its config.json, parts of names (after `names`) → what is made of that tensor, and how. Nothing drops it.
        when: read from its config.json whether it is this one of several families of that name.
        also: other classes that it may name for the same.
        part_of: whether it is a model of several parts, of which the language model alone is read.
    """

    model_type: str
    architecture: str
    into: str
    keys: Callable[[dict[str, Any]], dict[str, Any]] = lambda said: {}
    names: Mapping[str, str] = field(default_factory=dict)
    cuts: Callable[[dict[str, Any]], Cuts] = lambda said: {}
    when: Callable[[dict[str, Any]], bool] = lambda said: True
    part_of: bool = False
    also: tuple[str, ...] = ()


SHARED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "hidden_act", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("torch_dtype", "dtype", "quantization_config", "compression_config"),
)
"""Keys that mean the same everywhere."""
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
"""What they mean where a config leaves them out, as in Llama's; the classes of other families have defaults of their own."""


GPT_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    "transformer.ln_f": "model.norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
}
"""Names as in GPT-2 → as in Llama, where layers have two norms before what they belong to."""


def same(tensor: Tensor) -> Tensor:
    return tensor


def rows(start: int, stop: int) -> Cut:
    return lambda tensor: tensor[start:stop]


def fused(query: int, key: int) -> Mapping[str, Cut]:
    """Queries, then keys, then values, of so many rows."""
    return {
        "self_attn.q_proj": rows(0, query),
        "self_attn.k_proj": rows(query, query + key),
        "self_attn.v_proj": rows(query + key, query + 2 * key),
    }


def scaled(factor: float) -> Cut:
    return lambda tensor: (tensor.float() * factor).to(tensor.dtype)


def normalised(tensor: Tensor) -> Tensor:
    """Every row divided by its length, as the model does when it runs."""
    from torch.nn.functional import normalize

    return normalize(tensor)


def geometry(said: dict[str, Any], **theirs: str) -> dict[str, Any]:
    """Shared keys under other names: ours=theirs, several with commas. Those that are not there stay away."""
    found = {ours: next((said[k] for k in names.split(",") if said.get(k) is not None), None) for ours, names in theirs.items()}
    return {key: value for key, value in found.items() if value is not None}
