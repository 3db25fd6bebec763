"""GQA and MQA stay in the source's own architecture, with fewer key/value heads. Every engine runs them."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfold.convert.families.views import PART_OF, TRANSLATED, WHOLE
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.source.checkpoint import CheckpointReader, TensorSpec
from kvfold.convert.source.config import KERNELS
from kvfold.convert.source.model import UNREAD
from kvfold.surgery.attention import AttentionWeights


def config(source: dict[str, Any], plan: ConversionPlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config.json with fewer key heads, and head width and dtype written out."""
    return {**carried(source, dtype), "num_key_value_heads": plan.kv_heads, "head_dim": plan.spec.head_dim}


def carried(source: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config.json with its dtype written out and without code that it names."""
    # the quantisations are null, and three say how the source was read
    left = ("auto_map", "torch_dtype", "quantization_config", "compression_config", TRANSLATED, PART_OF, WHOLE, *KERNELS)
    return {**{key: value for key, value in source.items() if key not in left}, "dtype": written_dtype(source, dtype)}


def tensor_specs(reader: CheckpointReader, plan: ConversionPlan, dtype: torch.dtype | None) -> list[TensorSpec]:
    """Every tensor of the folded checkpoint, in the source's order."""
    spec = plan.spec
    narrowed = {
        name
        for layer in range(spec.layers)
        for role, name in plan.family.names(layer, spec).items()
        if role in ("k", "v", "k_bias", "v_bias", *(("k_norm",) if spec.key_norm == "whole" else ()))
    }
    fused = {plan.family.names(layer, spec).get("qkv") for layer in range(spec.layers)}
    specs = []
    for name, entry in kept(reader, plan).items():
        heads = spec.heads + 2 * plan.kv_heads if name in fused else plan.kv_heads
        shape = (heads * spec.head_dim, *entry.shape[1:]) if name in narrowed | fused else entry.shape
        specs.append(TensorSpec(name, dtype if dtype and entry.dtype.is_floating_point else entry.dtype, shape))
    return specs


def within(specs: Iterable[TensorSpec], reader: CheckpointReader, dtype: torch.dtype | None) -> list[TensorSpec]:
    """A language model's tensors under their names in the model that it is a part of, and that model's other tensors."""
    inside = [replace(spec, stored=reader.entry(spec.name).name) for spec in specs]
    cast = {True: dtype, False: None}
    return inside + [
        TensorSpec(name, cast[entry.dtype.is_floating_point] or entry.dtype, entry.shape)
        for name, entry in reader.beside.items()
    ]


def written_dtype(source: dict[str, Any], dtype: torch.dtype | None) -> str:
    """What a target's config.json says of its dtype: the source's, unless another is asked for."""
    stated = str(source.get("dtype") or source.get("torch_dtype") or "float32")
    return stated if dtype is None else str(dtype).removeprefix("torch.")


def in_place_of_attention(
    reader: CheckpointReader,
    plan: ConversionPlan,
    dtype: torch.dtype | None,
    of_layer: Callable[[int, torch.dtype], list[TensorSpec]],
) -> list[TensorSpec]:
    """Every tensor, in the source's order, with those of `of_layer` where a folded layer's attention begins."""
    attention = {n: layer for layer in plan.folded for n in plan.family.names(layer, plan.spec).values()}
    specs: dict[str, TensorSpec] = {}
    for name, entry in kept(reader, plan).items():
        kind = dtype if dtype and entry.dtype.is_floating_point else entry.dtype
        new = of_layer(attention[name], kind) if name in attention else [TensorSpec(name, kind, entry.shape)]
        specs.update({spec.name: spec for spec in new})
    return list(specs.values())


def kept(reader: CheckpointReader, plan: ConversionPlan) -> dict[str, Any]:
    """The source's entries without buffers that old checkpoints carry, and without a second copy of a tied embedding."""
    return {
        name: entry
        for name, entry in reader.entries.items()
        if not name.endswith(UNREAD) and not (plan.spec.tied and name == "lm_head.weight")
    }


def tensors(weights: AttentionWeights, layer: int, plan: ConversionPlan) -> dict[str, Tensor]:
    """Canonical form → tensors by name, as transformers stores them."""
    names = plan.family.names(layer, plan.spec)
    by_role = {
        "q": plan.family.stored_heads(weights.q, plan.spec),  # (H, D, d) → (H·D, d)
        "k": plan.family.stored_heads(weights.k, plan.spec),
        "v": weights.v.flatten(0, 1),
        "o": weights.o.permute(1, 0, 2).flatten(1),  # (H, d, D) → (d, H·D)
    }
    for role in ("q_bias", "k_bias", "v_bias", "o_bias"):
        bias = getattr(weights, role)
        if bias is not None:
            by_role[role] = plan.family.stored_heads(bias, plan.spec) if role in ("q_bias", "k_bias") else bias.flatten()
    if "qkv" in names:
        by_role["qkv"] = torch.cat([by_role.pop(role) for role in "qkv"])
    by_role |= {} if weights.sinks is None else {"sinks": weights.sinks}
    by_role |= plan.family.stored_norms(weights, plan.spec)
    return {names[role]: tensor for role, tensor in by_role.items()}


def lift(tensors: dict[str, Tensor], plan: ConversionPlan) -> AttentionWeights:
    """The inverse of `tensors`, for any one layer."""
    roles = {name.split(".", 3)[-1]: role for role, name in plan.family.names(0, plan.spec).items()}
    by_role = {roles[name.split(".", 3)[-1]]: tensor for name, tensor in tensors.items()}
    return plan.family.lift(by_role, replace(plan.spec, kv_heads=plan.kv_heads))


def names(layer: int, plan: ConversionPlan) -> list[str]:
    return list(plan.family.names(layer, plan.spec).values())


def origin(name: str, plan: ConversionPlan) -> tuple[str, float]:
    """All else is the source's own."""
    return name, 1.0


def files() -> dict[str, str]:
    return {}


def code() -> dict[str, str]:
    return {}
