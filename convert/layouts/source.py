"""GQA and MQA stay in the source's own architecture, with fewer key/value heads. Every engine runs them."""

from typing import Any

import torch
from torch import Tensor

from kvfold.convert.checkpoint import CheckpointReader, TensorSpec
from kvfold.convert.families import AttentionSpec, Family
from kvfold.surgery.attention import AttentionWeights


def config(source: dict[str, Any], spec: AttentionSpec, kv_heads: int, dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config.json with `kv_heads` key heads, and the head width written out."""
    changed = {**source, "num_key_value_heads": kv_heads, "head_dim": spec.head_dim}
    if dtype is not None:
        changed.pop("torch_dtype", None)
        changed["dtype"] = str(dtype).removeprefix("torch.")
    return changed


def tensor_specs(
    reader: CheckpointReader, family: Family, spec: AttentionSpec, kv_heads: int, dtype: torch.dtype | None
) -> list[TensorSpec]:
    """Every tensor of the folded checkpoint, in the source's order."""
    narrowed = {
        name: role
        for layer in range(spec.layers)
        for role, name in family.names(layer, spec).items()
        if role in ("k", "v", "k_bias", "v_bias")
    }
    tied = bool(reader.config.get("tie_word_embeddings", False))
    specs = []
    for name, entry in reader.entries.items():
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue  # a buffer that old checkpoints carry and transformers recomputes; a second copy of the embedding
        shape = entry.shape
        if name in narrowed:
            shape = (kv_heads * spec.head_dim, *shape[1:])
        specs.append(TensorSpec(name, dtype if dtype and entry.dtype.is_floating_point else entry.dtype, shape))
    return specs


def tensors(weights: AttentionWeights, names: dict[str, str]) -> dict[str, Tensor]:
    """Canonical form → tensors by name, as transformers stores them."""
    by_role = {
        "q": weights.q.flatten(0, 1),  # (H, D, d) → (H·D, d)
        "k": weights.k.flatten(0, 1),
        "v": weights.v.flatten(0, 1),
        "o": weights.o.permute(1, 0, 2).flatten(1),  # (H, d, D) → (d, H·D)
    }
    for role in ("q_bias", "k_bias", "v_bias", "o_bias"):
        bias = getattr(weights, role)
        if bias is not None:
            by_role[role] = bias.flatten()
    return {names[role]: tensor for role, tensor in by_role.items()}
