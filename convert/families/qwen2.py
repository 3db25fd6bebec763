"""Qwen2 and Qwen2.5: biases on q, k and v, none on o; a sliding window only when `use_sliding_window` says so."""

from kvfold.convert.families.base import Family

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer_prefix="model.layers.{layer}.",
    projections={role: "model.layers.{layer}.self_attn." + role + "_proj" for role in "qkvo"},
    qkv_bias=lambda config: True,
    o_bias=lambda config: False,
    windows=lambda said: [said["sliding_window"] if kind == "sliding_attention" else None for kind in said["layer_types"]],
)
