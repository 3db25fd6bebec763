"""How many parameters the source has, and how many fewer the target."""

import math
from typing import TYPE_CHECKING, Any

from kvfold.convert.families import AttentionSpec
from kvfold.convert.planning.widths import kept_scalars, widths_to_try
from kvfold.convert.source.config import resolve
from kvfold.errors import UserError

if TYPE_CHECKING:
    from kvfold.convert.planning.conversion_plan import ConversionPlan

GATED = {
    **dict.fromkeys(("llama", "granite", "seed_oss", "smollm3"), (2, "mlp_bias")),
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "olmo2", "olmo3", "exaone4", "gemma", "phi3", "glm"), (2, None)),
    **dict.fromkeys(("mixtral", "qwen3_moe"), (2, None)),
    **dict.fromkeys(("gemma2", "gemma3_text", "glm4"), (4, None)),
    **dict.fromkeys(("cohere", "cohere2"), (1, None)),
    "ernie4_5": (2, "use_bias"),
}
"""Families whose layers have attention, a gated MLP or experts, and norms without biases: how many norms, and the key of the
config that gives the MLP biases."""
EXPERTS = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}
"""Families with experts, and the key of the config that tells how wide these are."""


def source_parameters(config: dict[str, Any], spec: AttentionSpec) -> int:
    """Parameters of the source of a config.json, tied ones once. Raises UserError when transformers cannot build it."""
    if config["model_type"] not in GATED:
        from kvfold.convert.source.model import build_on_meta

        return build_on_meta(config).num_parameters()
    said, (norms, biased) = resolve(config), GATED[config["model_type"]]
    hidden, inner = spec.hidden_size, said["intermediate_size"]
    dense = 3 * hidden * inner + (2 * inner + hidden if biased and said[biased] else 0)
    mlps = sum(_experts(config["model_type"], said, layer) or dense for layer in range(spec.layers))
    layer = grouped_parameters(spec, spec.kv_heads) + norms * hidden
    return spec.vocab_size * hidden * (1 if spec.tied else 2) + spec.layers * layer + mlps + hidden  # one norm behind them


def _experts(model_type: str, said: dict[str, Any], layer: int) -> int:
    """Of a layer's experts and their router, 0 for a layer without."""
    step = said.get("decoder_sparse_step", 1)
    if not step:
        raise UserError("config.json: decoder_sparse_step is 0, which is no distance between layers: check that file")
    if model_type not in EXPERTS or layer in said.get("mlp_only_layers", ()) or (layer + 1) % step:
        return 0
    count = next(said[key] for key in ("num_local_experts", "num_experts") if key in said)
    return int(count * said["hidden_size"] * (3 * said[EXPERTS[model_type]] + 1))


def grouped_parameters(spec: AttentionSpec, kv_heads: int) -> int:
    """Of one layer's attention with so many key heads."""
    rows, heads = 2 * kv_heads * spec.head_dim, spec.heads * spec.head_dim
    norms = {"": 0, "head": 2 * spec.head_dim, "behind": 2 * spec.head_dim}.get(spec.key_norm, heads + rows // 2)
    return norms + (heads + rows) * (spec.hidden_size + spec.qkv_bias) + spec.hidden_size * (heads + spec.o_bias)


def saved(plan: "ConversionPlan") -> int:
    """Fewer parameters in all layers; less than none where latents are expanded again."""
    spec = plan.spec
    whole = len(plan.folded) * grouped_parameters(spec, spec.kv_heads)
    if plan.design == "grouped":
        return whole - spec.layers * grouped_parameters(spec, plan.kv_heads)
    folded = sum(_latent_parameters(plan, *plan.layer_widths(layer)) for layer in plan.folded)
    head = spec.vocab_size * spec.hidden_size if plan.layout != "kvfold" and spec.tied else 0
    return whole - folded - head  # engines want the output embedding written out


def saved_at_least(plan: "ConversionPlan") -> int:
    """`saved`, whatever widths the calibration text gives the layers, whose cached numbers keep their sum.

    What a layer of MLA or MFA has is affine in its widths, so the widest rotary key that is tried bounds it; in MFA-KR no
    layer has more per cached number than the widest that is tried.
    """
    if not plan.measures_widths or plan.widths:
        return saved(plan)
    mean, tried = int(plan.width_numbers), widths_to_try(plan)
    if plan.design == "reused-key":
        without = _latent_parameters(plan, 0, 0)
        most = without + max((_latent_parameters(plan, *w) - without) / sum(w) for w in tried) * mean
    elif plan.design == "latent" and plan.settings.to == "mla":
        most = max(_latent_parameters(plan, mean - rope, rope) for _, rope in tried if rope < mean)
    else:
        return saved(plan)
    return math.floor(len(plan.folded) * (grouped_parameters(plan.spec, plan.spec.kv_heads) - most))


def _latent_parameters(plan: "ConversionPlan", rank: int, rope: int) -> int:
    """Of one layer's attention."""
    spec, shape = plan.spec, plan.stored
    if plan.layout == "deepseek_v3":  # with the latent's norm
        rank, queries, heads = shape.rank, (shape.nope + shape.rope) * spec.hidden_size, shape.nope + shape.value
        cached = (shape.rank + shape.rope) * spec.hidden_size + rank
        return spec.heads * (queries + heads * rank + shape.value * spec.hidden_size) + cached
    if plan.layout == "step3_text":  # with the queries' norm
        read = plan.q_rank or 0
        queries = read * (spec.hidden_size + 1) + spec.heads * shape.rope * read
        return queries + 2 * shape.rope * spec.hidden_size + spec.heads * shape.rope * spec.hidden_size
    width = {"latent": shape.nope + rope, "reused-key": rope, "rebuilt-key": spec.head_dim}[plan.design]
    total = spec.heads * width * ((plan.settings.q_rank or spec.hidden_size) + spec.qkv_bias)
    if spec.key_norm:  # the source's queries, and what maps them and sizes the keys, or the norms' weights
        total = spec.heads * spec.head_dim * (spec.hidden_size + spec.qkv_bias)
        if plan.design == "rebuilt-key":
            total += (spec.heads + spec.kv_heads) * spec.head_dim
        else:
            total += spec.heads * width * spec.head_dim
            total += 2 * spec.heads * spec.head_dim if spec.key_norm == "behind" else 0
            if kept_scalars(spec, plan.settings):
                total += spec.kv_heads * spec.head_dim * (spec.hidden_size + spec.qkv_bias)
    total += (plan.settings.q_rank or 0) * spec.hidden_size
    total += (rank + rope) * (spec.hidden_size + 1) + spec.hidden_size * (spec.heads * spec.head_dim + 1)
    if plan.design == "latent":
        return total + spec.heads * ((shape.nope + spec.head_dim) * rank + plan.turned_keys(rank, rope) * shape.nope)
    if plan.design == "reused-key":
        return total + rope * rope + rope + spec.heads * spec.head_dim * rope
    return total + spec.kv_heads * spec.head_dim * (2 * rank + 1)
