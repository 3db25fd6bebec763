"""Mistral 7B and its kin: Llama's tensors without biases, and a sliding window in the first release."""

from kvfold.convert.families.base import Family

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer_prefix="model.layers.{layer}.",
    projections={role: "model.layers.{layer}.self_attn." + role + "_proj" for role in "qkvo"},
    qkv_bias=lambda config: False,
    o_bias=lambda config: False,
    windows=lambda said: [said["sliding_window"]] * said["num_hidden_layers"],
)
