"""The families that kvfold folds, one by one. What is left out is Llama's: see `Family`."""

from kvfold.convert.families.base import Family, windows_by_kind

PROJECTIONS = {role: f"{role}_proj" for role in "qkvo"}
NORMED = {**PROJECTIONS, "q_norm": "q_norm", "k_norm": "k_norm"}

LLAMA = Family("llama", "LlamaForCausalLM")
"""Llama 1 to 3.x, TinyLlama, SmolLM and SmolLM2, and whatever else calls itself `llama`."""
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    windows=lambda said: [said["sliding_window"]] * said["num_hidden_layers"],
)
"""Mistral 7B and its kin: a sliding window in the first release."""
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    qkv_bias=lambda said: True,
    o_bias=lambda said: False,
    windows=windows_by_kind,
)
"""Qwen2 and Qwen2.5: biases on q, k and v, none on o; a sliding window only when `use_sliding_window` says so."""
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", modules=NORMED, windows=windows_by_kind, key_norm="head")
"""Qwen3: every head of queries and keys goes through an RMSNorm whose weight all heads share."""

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
