"""Llama 1 to 3.x, TinyLlama, SmolLM and SmolLM2, and whatever else calls itself `llama`."""

from kvfold.convert.families.base import Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer_prefix="model.layers.{layer}.",
    projections={role: "model.layers.{layer}.self_attn." + role + "_proj" for role in "qkvo"},
    qkv_bias=lambda config: bool(config.get("attention_bias")),
    o_bias=lambda config: bool(config.get("attention_bias")),
    windows=lambda said: [None] * said["num_hidden_layers"],
)
