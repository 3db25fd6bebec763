"""MFA as stock `step3_text` with every layer dense, which vLLM serves; transformers has no such class.

- The wide key's frequencies are the grid of its stored width, so it must hold the first frequencies of the source, one
  component each: `θ' = θ^(C/D)`. Zeros pad each half of the key to a head width that vLLM's kernels take.
- Queries stand behind a norm of their low-rank part. It is made linear as in deepseek_v3: what it reads is written so
  small that its mean square vanishes beside eps, and `wq` undoes both.
- W_O absorbs the heads' maps from the wide value; the output embedding is written out, because vLLM does not tie it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kvfold.convert.layouts.deepseek_v3 import EMBEDDING, HEAD, LATENT, pad, with_output_embedding
from kvfold.convert.layouts.source import in_place_of_attention, written_dtype
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.source.checkpoint import CheckpointReader, TensorSpec
from kvfold.convert.source.config import resolve
from kvfold.surgery.designs import LatentWeights


def config(source: dict[str, Any], plan: ConversionPlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """A dense Step3 config: `moe_layers_enum` names a layer that there is not."""
    said, spec, width = resolve(source), plan.spec, plan.stored.rope
    carried = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")
    return {
        "architectures": ["Step3TextForCausalLM"],
        "model_type": "step3_text",
        **{key: said[key] for key in (*carried, *ids) if key in said},
        "head_dim": width,
        "share_q_dim": plan.q_rank,
        "num_attention_groups": 1,
        "max_seq_len": spec.max_positions,
        "max_position_embedding": spec.max_positions,
        "rope_parameters": {
            **spec.rope.parameters,
            "rope_type": spec.rope.type,
            "rope_theta": spec.rope.theta ** (width / spec.head_dim),
        },
        "moe_layers_enum": str(spec.layers + 9999),
        "tie_word_embeddings": False,
        "dtype": written_dtype(source, dtype),
    }


def tensor_specs(reader: CheckpointReader, plan: ConversionPlan, dtype: torch.dtype | None) -> list[TensorSpec]:
    """Every tensor: per layer the attention of Step3 in the place of the source's, and the output embedding."""
    spec, width, rank = plan.spec, plan.stored.rope, plan.q_rank or 0
    shapes = (
        (rank, spec.hidden_size),
        (rank,),
        (spec.heads * width, rank),
        (width, spec.hidden_size),
        (width, spec.hidden_size),
        (spec.hidden_size, spec.heads * width),
    )

    def of_layer(layer: int, kind: torch.dtype) -> list[TensorSpec]:
        return [TensorSpec(n, kind, shape) for shape, n in zip(shapes, names(layer, plan), strict=True)]

    return with_output_embedding(in_place_of_attention(reader, plan, dtype, of_layer))


def names(layer: int, plan: ConversionPlan) -> list[str]:
    parts = ("q_proj", "inter_norm", "wq", "k_proj", "v_proj", "o_proj")
    return [f"model.layers.{layer}.self_attn.{part}.weight" for part in parts]


def tensors(weights: LatentWeights, layer: int, plan: ConversionPlan) -> dict[str, Tensor]:
    """Canonical form → tensors by name, as vLLM reads them."""
    width, (down, undo) = plan.stored.rope, query_scales(plan)
    assert weights.q_down is not None  # `ConversionPlan.q_rank` says so
    stored = (
        weights.q_down * down,  # (m, d)
        torch.ones(len(weights.q_down), device=weights.q_down.device),
        pad_halves(weights.q_rope, width).flatten(0, 1) * undo,  # (H, C, m) → (H·C', m)
        pad_halves(weights.k_rope, width),
        pad(weights.down, width),
        pad(weights.o @ weights.up_v, width, -1).permute(1, 0, 2).flatten(1),  # (H, d, C) → (d, H·C')
    )
    return dict(zip(names(layer, plan), stored, strict=True))


def lift(tensors: dict[str, Tensor], plan: ConversionPlan) -> LatentWeights:
    """The inverse of `tensors`, for any one layer; W_O stays merged, so each head's value is the whole wide one."""
    width, rank, (down, undo) = plan.stored.rope, plan.kv_rank, query_scales(plan)
    q_a, _, q_b, key, value, o = (t.float() for t in tensors.values())
    heads = plan.spec.heads
    return LatentWeights(
        q_nope=q_a.new_zeros(heads, 0, len(q_a)),
        q_rope=unpad_halves(q_b.unflatten(0, (-1, width)), plan.rope_dim) / undo,
        down=value[:rank],
        k_rope=unpad_halves(key, plan.rope_dim),
        up_k=q_a.new_zeros(heads, 0, rank),
        up_v=torch.eye(rank, device=q_a.device).expand(heads, -1, -1),
        o=o.unflatten(1, (-1, width)).permute(1, 0, 2)[..., :rank],
        pairs=torch.arange(plan.rope_dim // 2, device=q_a.device),
        q_down=q_a / down,
    )


def query_scales(plan: ConversionPlan) -> tuple[float, float]:
    """What is written into the low-rank part of the queries, and what undoes it and the wider softmax scale behind the norm."""
    down = LATENT * math.sqrt(plan.spec.norm_eps / 1e-6)
    return down, math.sqrt(plan.spec.norm_eps) / down * math.sqrt(plan.stored.rope / plan.rope_dim)


def pad_halves(rows: Tensor, width: int) -> Tensor:
    """Rotary rows (..., C, n), half-split, with zeros behind each half → (..., width, n)."""
    return torch.cat([pad(half, width // 2) for half in rows.chunk(2, dim=-2)], dim=-2)


def unpad_halves(rows: Tensor, width: int) -> Tensor:
    return torch.cat([half[..., : width // 2, :] for half in rows.chunk(2, dim=-2)], dim=-2)


def origin(name: str, plan: ConversionPlan) -> tuple[str, float]:
    """All else is the source's own; a tied output embedding is the embedding."""
    return (EMBEDDING if name == HEAD and plan.spec.tied else name), 1.0


def files() -> dict[str, str]:
    return {}


def code() -> dict[str, str]:
    return {}
