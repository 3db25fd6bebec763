"""MLA as stock `deepseek_v3` with every layer dense: transformers, vLLM and SGLang run it with their own MLA kernels.

Four exact re-parameterisations make a folded Llama out of DeepSeek-V3's parts:

- Rotary rows are interleaved, pair by pair, and the base becomes `θ' = θ^(R/D)`, whose grid of width R is the first R/2
  frequencies of the source. R is the stored width: zeros pad what a kernel wants wider.
- The latent's RMSNorm is made linear: the latent is written `LATENT` times as large, so that its mean square vanishes
  beside the norm's eps of 1e-6, and `kv_b_proj` undoes both. What is left is relative `mean(c²)/(2·eps)`, about 2e-6.
- Engines share one eps among all norms and fix the latent's at 1e-6. A residual stream scaled by `a = √(1e-6/eps)` turns
  every norm's eps into 1e-6: the embedding, o_proj and down_proj carry `a`.
- The output embedding is written out, because vLLM does not tie it.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfold.convert.layouts.source import in_place_of_attention, written_dtype
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.source.checkpoint import CheckpointReader, TensorSpec
from kvfold.convert.source.config import resolve
from kvfold.surgery.designs import LatentWeights

EPS = 1e-6
LATENT = 2.0**-19
"""With E[mean(c²)] = 1, mean(c²)/eps is 3.6e-6."""


def config(source: dict[str, Any], plan: ConversionPlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """A dense DeepSeek-V3 config: `first_k_dense_replace` goes past the last layer, and no engine uses the MoE fields."""
    said, spec = resolve(source), plan.spec
    carried = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range", "use_cache")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{key: said[key] for key in (*carried, *ids) if key in said},
        "num_key_value_heads": spec.heads,
        "q_lora_rank": None,
        "kv_lora_rank": plan.stored.rank,
        "qk_nope_head_dim": plan.stored.nope,
        "qk_rope_head_dim": plan.stored.rope,
        "v_head_dim": plan.stored.value,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope.theta ** (plan.stored.rope / spec.head_dim)},
        "rms_norm_eps": EPS,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "first_k_dense_replace": spec.layers + 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": said["intermediate_size"],
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "dtype": written_dtype(source, dtype),
    }


def tensor_specs(reader: CheckpointReader, plan: ConversionPlan, dtype: torch.dtype | None) -> list[TensorSpec]:
    """Every tensor: per layer the attention of DeepSeek-V3 in the place of the source's, and the output embedding."""
    spec, shape = plan.spec, plan.stored
    shapes = {
        "q_proj": (spec.heads * (shape.nope + shape.rope), spec.hidden_size),
        "kv_a_proj_with_mqa": (shape.rank + shape.rope, spec.hidden_size),
        "kv_a_layernorm": (shape.rank,),
        "kv_b_proj": (spec.heads * (shape.nope + shape.value), shape.rank),
        "o_proj": (spec.hidden_size, spec.heads * shape.value),
    }

    def of_layer(layer: int, kind: torch.dtype) -> list[TensorSpec]:
        return [TensorSpec(n, kind, shapes[part]) for part, n in zip(shapes, names(layer, plan), strict=True)]

    return with_output_embedding(in_place_of_attention(reader, plan, dtype, of_layer))


def with_output_embedding(specs: list[TensorSpec]) -> list[TensorSpec]:
    """These, and where a source ties it the output embedding, in the input embedding's shape."""
    if any(spec.name == HEAD for spec in specs):
        return specs
    return [*specs, replace(next(spec for spec in specs if spec.name == EMBEDDING), name=HEAD)]


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def names(layer: int, plan: ConversionPlan) -> list[str]:
    parts = ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    return [f"model.layers.{layer}.self_attn.{part}.weight" for part in parts]


def tensors(weights: LatentWeights, layer: int, plan: ConversionPlan) -> dict[str, Tensor]:
    """Canonical form → tensors by name, as transformers stores them."""
    shape, undo = plan.stored, math.sqrt(EPS) / LATENT
    q_nope, q_rope = pad(weights.q_nope, shape.nope), pad(interleave(weights.q_rope), shape.rope)
    up_k, up_v = (
        pad(pad(up, width), shape.rank, -1) for up, width in ((weights.up_k, shape.nope), (weights.up_v, shape.value))
    )
    stored = (
        torch.cat([q_nope, q_rope], 1).flatten(0, 1) * padding_scale(plan),  # (H, N + R, d) → (H·(N + R), d)
        torch.cat([pad(weights.down * LATENT, shape.rank), pad(interleave(weights.k_rope), shape.rope)]),  # (r + R, d)
        torch.ones(shape.rank, device=weights.down.device),
        torch.cat([up_k, up_v], 1).flatten(0, 1) * undo,  # (H, N + D, r) → (H·(N + D), r)
        pad(weights.o, shape.value, -1).permute(1, 0, 2).flatten(1) * residual_scale(plan),  # (H, d, D) → (d, H·D)
    )
    return dict(zip(names(layer, plan), stored, strict=True))


def lift(tensors: dict[str, Tensor], plan: ConversionPlan) -> LatentWeights:
    """The inverse of `tensors`, for any one layer."""
    width, shape = plan.spec.head_dim, plan.stored
    q, kv_a, _, kv_b, o = (t.float() for t in tensors.values())
    q = q.unflatten(0, (-1, shape.nope + shape.rope)) / padding_scale(plan)
    up = kv_b.unflatten(0, (-1, shape.nope + shape.value))[..., : plan.kv_rank] * (LATENT / math.sqrt(EPS))
    return LatentWeights(
        q_nope=q[:, :width],
        q_rope=interleave(q[:, shape.nope : shape.nope + plan.rope_dim], back=True),
        down=kv_a[: plan.kv_rank] / LATENT,
        k_rope=interleave(kv_a[shape.rank : shape.rank + plan.rope_dim], back=True),
        up_k=up[:, :width],
        up_v=up[:, shape.nope : shape.nope + width],
        pairs=torch.arange(plan.rope_dim // 2, device=q.device),
        o=o.unflatten(1, (-1, shape.value))[..., :width].permute(1, 0, 2) / residual_scale(plan),
    )


def pad(tensor: Tensor, size: int, dim: int = -2) -> Tensor:
    """Zeros behind dimension `dim` up to `size`."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def padding_scale(plan: ConversionPlan) -> float:
    """Engines divide scores by the root of the stored width; queries take the difference."""
    return math.sqrt((plan.stored.nope + plan.stored.rope) / (plan.spec.head_dim + plan.rope_dim))


def interleave(rows: Tensor, back: bool = False) -> Tensor:
    """Rotary rows (..., R, d) from half-split to interleaved order: dims i and i + R/2 become 2i and 2i + 1."""
    pairs = (-1, 2) if back else (2, -1)
    return rows.unflatten(-2, pairs).transpose(-3, -2).flatten(-3, -2)


def residual_scale(plan: ConversionPlan) -> float:
    """`a`: the factor on the residual stream."""
    return math.sqrt(EPS / plan.spec.norm_eps)


def origin(name: str, plan: ConversionPlan) -> tuple[str, float]:
    """The embedding and down_proj write the residual stream; a tied output embedding is the embedding without its factor."""
    if name == HEAD and plan.spec.tied:
        return EMBEDDING, 1.0
    writes = name == EMBEDDING or name.endswith("mlp.down_proj.weight")
    return name, residual_scale(plan) if writes else 1.0


def files() -> dict[str, str]:
    return {}


def code() -> dict[str, str]:
    return {}
