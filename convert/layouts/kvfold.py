"""Our own layout, for what no stock architecture says: the source's class with other attention, whose code travels along.

Tensors of the attention are the parameters of the designs in surgery/kvfold_attention.py under their own names; nothing is
padded or rescaled. Biases of the latent and of the output are always there, zeros where a layer has none.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.convert.layouts import modeling_kvfold
from kvfold.convert.layouts.source import carried, in_place_of_attention
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.source.checkpoint import CheckpointReader, TensorSpec
from kvfold.convert.source.model import refuse_pairs
from kvfold.errors import UserError
from kvfold.surgery import kvfold_attention
from kvfold.surgery.designs import FoldedWeights, design, weights_of
from kvfold.surgery.kvfold_attention import DESIGNS, POSITIONS, FoldedAttention

TRAVELLING = (Path(inspect.getfile(modeling_kvfold)), Path(inspect.getfile(kvfold_attention)))


def config(source: dict[str, Any], plan: ConversionPlan, dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config under our model type, with the widths of every folded layer's design."""
    return {
        **carried(source, dtype),
        "architectures": ["KvfoldForCausalLM"],
        "model_type": "kvfold",
        "source_model_type": plan.family.model_type,
        "auto_map": code(),
        "folded_layers": [widths(plan, layer) if layer in plan.folded else None for layer in range(plan.spec.layers)],
    }


def widths(plan: ConversionPlan, layer: int) -> dict[str, Any]:
    """A layer's design and what it is made with."""
    spec, (rank, rope) = plan.spec, plan.layer_widths(layer)
    shape = {
        "latent": {"rank": rank, "rope_dim": rope, "nope_dim": plan.stored.nope, "turned": plan.turned_keys(rank, rope)},
        "reused-key": {"rope_dim": rope},
        "rebuilt-key": {"rank": rank, "kv_heads": spec.kv_heads},
    }[plan.design]
    shared = {"heads": spec.heads, "value_dim": spec.head_dim, "q_rank": plan.q_rank, "query_bias": spec.qkv_bias}
    sized = 0 if plan.settings.key_norm == "mean" else spec.kv_heads
    norm = {"kv_heads": sized, "together": spec.key_norm == "whole", "eps": spec.norm_eps}
    norm |= {"behind": True} if spec.key_norm == "behind" else {}
    special = {
        "norm": norm if spec.key_norm else None,
        "cap": spec.score_cap,
        "sinks": spec.sinks or None,
        "positions": spec.positions(layer) if spec.positions(layer) != "halves" else None,
    }
    return {"design": plan.design, **shape, **shared, **{name: value for name, value in special.items() if value is not None}}


def tensor_specs(reader: CheckpointReader, plan: ConversionPlan, dtype: torch.dtype | None) -> list[TensorSpec]:
    """Every tensor: per layer the design's parameters in the place of the source's attention."""

    def of_layer(layer: int, kind: torch.dtype) -> list[TensorSpec]:
        held = blank(plan, layer).state_dict()
        prefix = plan.family.attention_prefix(layer)
        return [TensorSpec(prefix + n, kind if t.is_floating_point() else t.dtype, tuple(t.shape)) for n, t in held.items()]

    return in_place_of_attention(reader, plan, dtype, of_layer)


def refuse_other(config: dict[str, Any], plan: ConversionPlan, file: Path) -> None:
    """Raise UserError when a config.json, which lies in `file`, is damaged, or has another attention than the plan."""
    remedy = "convert the source again, or get that file again"
    if reason := modeling_kvfold.damage(config):
        raise UserError(f"{file} is damaged ({reason}): {remedy}")
    if config["source_model_type"] != plan.family.model_type:
        raise UserError(f"{file} names source_model_type {config['source_model_type']}, not {plan.family.model_type}: {remedy}")
    for layer, said in enumerate(config["folded_layers"]):
        meant = widths(plan, layer) if layer in plan.folded else None
        if whole(said) != whole(meant):
            raise UserError(f"{file} has another attention in layer {layer} than was folded: {remedy}")


def whole(widths: dict[str, Any] | None) -> dict[str, Any] | None:
    """A layer's design with what it takes by default."""
    if widths is None:
        return None
    defaults = {name: parameter.default for name, parameter in modeling_kvfold.taken_by(widths["design"]).items()}
    return {"positions": POSITIONS[0], **defaults, **widths}


def blank(plan: ConversionPlan, layer: int) -> FoldedAttention:
    """The design of a layer with shapes and no numbers."""
    made = widths(plan, layer)
    made.pop("positions", None)
    with torch.device("meta"):
        return DESIGNS[made.pop("design")](plan.spec.hidden_size, **made)


def tensors(weights: FoldedWeights, layer: int, plan: ConversionPlan) -> dict[str, Tensor]:
    """The design's parameters by name; zeros for a bias that it does without."""
    held = design(weights).state_dict()
    wanted = blank(plan, layer).state_dict()
    return {plan.family.attention_prefix(layer) + n: held[n] if n in held else torch.zeros(t.shape) for n, t in wanted.items()}


def lift(tensors: dict[str, Tensor], plan: ConversionPlan) -> FoldedWeights:
    """The inverse of `tensors`."""
    layer = int(next(part for part in next(iter(tensors)).split(".") if part.isdecimal()))
    module = blank(plan, layer)
    held = {
        name.removeprefix(plan.family.attention_prefix(layer)): t.float() if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    module.load_state_dict(held, assign=True)
    refuse_pairs(module, f"layer {layer}")
    return weights_of(module)


def names(layer: int, plan: ConversionPlan) -> list[str]:
    return [plan.family.attention_prefix(layer) + name for name in blank(plan, layer).state_dict()]


def origin(name: str, plan: ConversionPlan) -> tuple[str, float]:
    """All else is the source's own."""
    return name, 1.0


def files() -> dict[str, str]:
    """What a checkpoint needs beside its weights and config."""
    return {path.name: path.read_text() for path in TRAVELLING}


def code() -> dict[str, str]:
    """`auto_map`: the classes in `files`."""
    return dict(modeling_kvfold.CODE)
