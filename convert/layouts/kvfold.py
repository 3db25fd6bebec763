"""Our own layout, for what no stock architecture says: its modelling file travels with the checkpoint.

Tensors are the parameters of the designs in surgery/designs.py under their own names; nothing is padded or rescaled.
Biases of the latent and of the output are always there, zeros where a layer has none.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.convert.checkpoint import CheckpointReader, TensorSpec
from kvfold.convert.config import resolve
from kvfold.convert.layouts.source import in_place_of_attention, written_dtype
from kvfold.convert.plan import ConversionPlan
from kvfold.surgery.designs import Design, FoldedWeights, LatentWeights, RebuiltKeyWeights, ReusedKeyWeights, design

MODELLING = Path(__file__).parent / "modeling_kvfold.py"
CARRIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "mlp_bias"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings"),
    *("rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def config(source: dict[str, Any], plan: ConversionPlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config under our model type, with the widths of the design."""
    said, spec, latent = resolve(source), plan.spec, plan.design != "reused-key"
    ranks, ropes = ([plan.layer_widths(layer)[part] for layer in range(spec.layers)] for part in (0, 1))
    return {
        "architectures": ["KvfoldForCausalLM"],
        "model_type": "kvfold",
        "auto_map": code(),
        **{key: said[key] for key in CARRIED if key in said},
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "sliding_window": spec.sliding_window,
        "attention_design": plan.design,
        "kv_lora_rank": ranks if latent else None,
        "qk_rope_head_dim": ropes if plan.design != "rebuilt-key" else None,
        "qk_nope_head_dim": plan.stored.nope if plan.design == "latent" else None,
        "q_lora_rank": plan.q_rank,
        "query_bias": spec.qkv_bias,
        "dtype": written_dtype(source, dtype),
    }


def tensor_specs(reader: CheckpointReader, plan: ConversionPlan, dtype: torch.dtype | None) -> list[TensorSpec]:
    """Every tensor: per layer the design's parameters in the place of the source's attention."""

    def of_layer(layer: int, kind: torch.dtype) -> list[TensorSpec]:
        held = blank(plan, *plan.layer_widths(layer)).state_dict()
        return [
            TensorSpec(prefix(layer) + n, kind if t.is_floating_point() else t.dtype, tuple(t.shape)) for n, t in held.items()
        ]

    return in_place_of_attention(reader, plan, dtype, of_layer)


def prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def blank(plan: ConversionPlan, rank: int, rope: int) -> Design:
    """The design with shapes and no numbers."""
    spec, q_rank = plan.spec, plan.q_rank
    hidden, heads, width, read = spec.hidden_size, spec.heads, spec.head_dim, q_rank or spec.hidden_size

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    def queries(columns: int) -> dict[str, Tensor | None]:
        return {
            "q_down": None if q_rank is None else empty(q_rank, hidden),
            "q_bias": empty(heads, columns) if spec.qkv_bias else None,
        }

    o, o_bias = empty(heads, hidden, width), empty(hidden)
    pairs = torch.empty(rope // 2, dtype=torch.int64, device="meta")
    if plan.design == "reused-key":
        key, up_v = empty(rope, hidden), empty(heads, width, rope)
        q, reuse = empty(heads, rope, read), empty(rope, rope)
        return design(
            ReusedKeyWeights(q, key, pairs, reuse, empty(rope), up_v, o, k_bias=empty(rope), o_bias=o_bias, **queries(rope))
        )
    if plan.design == "rebuilt-key":
        q, up = empty(heads, width, read), empty(spec.kv_heads, width, rank)
        k_bias = empty(spec.kv_heads, width)
        return design(
            RebuiltKeyWeights(
                q, empty(rank, hidden), up, up, o, kv_bias=empty(rank), k_bias=k_bias, o_bias=o_bias, **queries(width)
            )
        )
    nope = plan.stored.nope
    return design(
        LatentWeights(
            q_nope=empty(heads, nope, read),
            q_rope=empty(heads, rope, read),
            down=empty(rank, hidden),
            k_rope=empty(rope, hidden),
            up_k=empty(heads, nope, rank),
            up_v=empty(heads, width, rank),
            o=o,
            pairs=pairs,
            kv_bias=empty(rank + rope),
            o_bias=o_bias,
            **queries(nope + rope),
        )
    )


def tensors(weights: FoldedWeights, layer: int, plan: ConversionPlan) -> dict[str, Tensor]:
    """The design's parameters by name; zeros for a bias that it does without."""
    held = design(weights).state_dict()
    wanted = blank(plan, *plan.layer_widths(layer)).state_dict()
    return {prefix(layer) + n: held[n] if n in held else torch.zeros(t.shape) for n, t in wanted.items()}


def lift(tensors: dict[str, Tensor], plan: ConversionPlan) -> FoldedWeights:
    """The inverse of `tensors`, for any one layer."""
    held = {name.split("self_attn.")[1]: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    rope = 2 * len(held["rope_pairs"]) if "rope_pairs" in held else 0
    rank = len(held["kv_a_proj.weight"]) - rope if "kv_a_proj.weight" in held else 0
    module = blank(plan, rank, rope)
    module.load_state_dict(held, assign=True)
    return module.weights()


def names(layer: int, plan: ConversionPlan) -> list[str]:
    return [prefix(layer) + name for name in blank(plan, *plan.layer_widths(layer)).state_dict()]


def origin(name: str, plan: ConversionPlan) -> tuple[str, float]:
    """All else is the source's own."""
    return name, 1.0


def files() -> dict[str, str]:
    """What a checkpoint needs beside its weights and config."""
    return {MODELLING.name: MODELLING.read_text()}


def code() -> dict[str, str]:
    """`auto_map`: the classes in `files`."""
    return {"AutoConfig": "modeling_kvfold.KvfoldConfig", "AutoModelForCausalLM": "modeling_kvfold.KvfoldForCausalLM"}
