"""The families that kvfold folds, one by one. What is left out is Llama's: see `Family`."""

from kvfold.convert.families.base import Experts, Family, windows_by_kind, windows_of_all

PROJECTIONS = {role: f"{role}_proj" for role in "qkvo"}
NORMED = {**PROJECTIONS, "q_norm": "q_norm", "k_norm": "k_norm"}

LLAMA = Family("llama", "LlamaForCausalLM")
"""Llama 1 to 3.x, TinyLlama, SmolLM and SmolLM2, and whatever else calls itself `llama`."""
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    qkv_bias=lambda said: False,
    o_bias=lambda said: False,
    windows=windows_of_all,
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
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    modules=NORMED,
    key_norm="whole",
    beside="its norms stand behind attention and MLP",
)
"""OLMo 2: one RMSNorm over the queries of all heads and one over their keys; attention reads the stream as it is."""
GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    beside="its norms multiply by one more than their weight, and its embedding has a scale",
)
"""Gemma 1."""
GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    score_scale=lambda said: float(said["attention_multiplier"]),
    beside="its embedding, residuals and logits have scales of their own",
)
"""Granite 3: four multipliers, of which scores have one."""
STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    qkv_bias=lambda said: bool(said["use_bias"]),
    o_bias=lambda said: bool(said["use_bias"]),
    windows=windows_of_all,
    beside="its norms are LayerNorms, and its MLP has no gate",
)
"""StarCoder 2: biases everywhere."""
SEED_OSS = Family("seed_oss", "SeedOssForCausalLM", o_bias=lambda said: bool(said["attention_out_bias"]))
"""Seed-OSS: biases on q, k and v."""
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    modules={"qkv": "qkv_proj", "o": "o_proj"},
    qkv_bias=lambda said: False,
    o_bias=lambda said: False,
    windows=windows_of_all,
    partial=True,
    beside="gate and up of its MLP are one matrix",
)
"""Phi-3, 3.5 and 4: queries, keys and values are one matrix."""

STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    qkv_bias=lambda said: bool(said["use_qkv_bias"]),
    o_bias=lambda said: False,
    partial=True,
    beside="its norms are LayerNorms",
)
"""StableLM: RoPE turns a quarter of each head."""
EXPERTS = "its layers have experts"
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    qkv_bias=lambda said: False,
    o_bias=lambda said: False,
    windows=windows_of_all,
    experts=Experts("block_sparse_moe", "w1", "w3", "w2"),
    beside=EXPERTS,
)
"""Mixtral: Mistral's attention, and experts."""
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    qkv_bias=lambda said: bool(said["qkv_bias"]),
    o_bias=lambda said: False,
    windows=windows_by_kind,
    experts=Experts(),
    beside=EXPERTS,
)
"""Qwen1.5-MoE and Qwen2-MoE."""
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    modules=NORMED,
    windows=windows_of_all,
    key_norm="head",
    experts=Experts(),
    beside=EXPERTS,
)
"""Qwen3-MoE."""

KNOWN = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA, GRANITE, PHI3, STARCODER2, SEED_OSS, STABLELM),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE),
)
FAMILIES = {family.model_type: family for family in KNOWN}
