"""The families that kvfold folds, one by one. What is left out is Llama's: see `Family`."""

from dataclasses import replace
from typing import Any

from kvfold.convert.families.base import Experts, Family, no_windows, windows_by_kind, windows_of_all

PROJECTIONS = {role: f"{role}_proj" for role in "qkvo"}
LAYER_NORMS = "its norms are LayerNorms"
NORMED = {**PROJECTIONS, "q_norm": "q_norm", "k_norm": "k_norm"}


def unturned_without_window(said: dict[str, Any]) -> list[bool]:
    """Where the config has a window, RoPE turns the layers that have it."""
    return [said["sliding_window"] is None or window is not None for window in windows_by_kind(said)]


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
    beside=LAYER_NORMS,
)
"""StableLM: RoPE turns a quarter of each head."""
PARALLEL = "attention and MLP of a layer read the same stream"
COHERE = Family("cohere", "CohereForCausalLM", interleaved=True, tables="pairs", beside=PARALLEL)
"""Command R and Aya: RoPE turns neighbouring numbers, attention and MLP stand side by side."""
COHERE_NORMED = replace(COHERE, modules=NORMED, key_norm="centred", grouped=False)
"""Command R+: every head of queries and keys goes through a LayerNorm of its own."""
GLM = Family(
    "glm",
    "GlmForCausalLM",
    o_bias=lambda said: False,
    partial=True,
    interleaved=True,
    beside="gate and up of its MLP are one matrix",
)
"""GLM-4: RoPE turns neighbouring numbers in the first half of each head."""
GLM4 = replace(GLM, model_type="glm4", architecture="Glm4ForCausalLM", beside="its layers have four norms")
"""GLM-4-0414: the same between two norms more."""
ERNIE4_5 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    qkv_bias=lambda said: bool(said["use_bias"]),
    o_bias=lambda said: bool(said["use_bias"]),
    interleaved=True,
)
"""ERNIE 4.5: Llama whose RoPE turns neighbouring numbers."""
PHI = Family(
    "phi",
    "PhiForCausalLM",
    modules={**PROJECTIONS, "o": "dense"},
    qkv_bias=lambda said: True,
    o_bias=lambda said: True,
    partial=True,
    beside=f"{LAYER_NORMS}, and {PARALLEL}",
)
"""Phi-1, 1.5 and 2: biases everywhere, attention and MLP stand side by side."""
GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    layer_prefix="gpt_neox.layers.{layer}.",
    attention="attention",
    modules={"qkv": "query_key_value", "o": "dense"},
    by_head=True,
    grouped=False,
    partial=True,
    renamed={"lm_head.weight": "embed_out.weight"},
    beside=LAYER_NORMS,
)
"""Pythia and GPT-NeoX: one matrix with query, key and value of one head after the other, RoPE on a quarter of each."""
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    windows=windows_by_kind,
    score_scale=lambda said: float(said["query_pre_attn_scalar"]) ** -0.5,
    score_cap=lambda said: said["attn_logit_softcapping"],
    beside="its layers have four norms, and its logits are soft-capped",
)
"""Gemma 2: every other layer looks back over a window, and scores are soft-capped."""
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    modules=NORMED,
    windows=windows_by_kind,
    key_norm="head",
    norm_offset=1.0,
    score_scale=lambda said: float(said["query_pre_attn_scalar"]) ** -0.5,
    beside="its layers have four norms, and its embedding has a scale",
)
"""Gemma 3: five layers with a window and a RoPE of their own for each that attends over everything; norms add one."""
COHERE2 = replace(
    COHERE,
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    windows=windows_by_kind,
    turning=lambda said: [window is not None for window in windows_by_kind(said)],
)
"""Command R7B and Command A: three layers with a window for each that attends over everything, which has no RoPE."""
SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    windows=lambda said: windows_by_kind(said) if said["use_sliding_window"] else no_windows(said),
    turning=lambda said: list(map(bool, said["no_rope_layers"])),
)
"""SmolLM3: every fourth layer has no RoPE."""
OLMO3 = replace(OLMO2, model_type="olmo3", architecture="Olmo3ForCausalLM", windows=windows_by_kind)
"""OLMo 3: OLMo 2 with three layers that look back over a window for each that attends over everything."""
EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    modules=NORMED,
    windows=windows_by_kind,
    turning=unturned_without_window,
    key_norm="head",
    beside=OLMO2.beside,
)
"""EXAONE 4: norms as in OLMo 2; where some layers have a window, the others have no RoPE."""
EXPERTS = "its layers have experts"
GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    modules={**PROJECTIONS, "sinks": "sinks"},
    windows=windows_by_kind,
    tables="once",
    beside=EXPERTS,
)
"""gpt-oss: every other layer looks back over 128 tokens, and each head has a sink; experts lie on the disk as in memory."""
W123 = Experts("block_sparse_moe", "w1", "w3", "w2")
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    qkv_bias=lambda said: False,
    o_bias=lambda said: False,
    windows=windows_of_all,
    experts=W123,
    beside=EXPERTS,
)
"""Mixtral: Mistral's attention, and experts."""
PHIMOE = replace(
    MIXTRAL,
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    qkv_bias=LLAMA.qkv_bias,
    o_bias=LLAMA.o_bias,
    experts=replace(W123, router="router"),
    beside=f"{EXPERTS}, and {LAYER_NORMS}",
)
"""Phi-3.5-MoE: Mixtral between LayerNorms, with biases."""
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
HUNYUAN = Family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    modules={**PROJECTIONS, "q_norm": "query_layernorm", "k_norm": "key_layernorm"},
    key_norm="behind",
)
"""Hunyuan: as Qwen3, with norms of queries and keys that stand behind RoPE."""

KNOWN = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA, GRANITE, PHI3, STARCODER2, SEED_OSS, STABLELM),
    *(COHERE, GLM, GLM4, ERNIE4_5, PHI, GPT_NEOX),
    *(GEMMA2, GEMMA3, COHERE2, SMOLLM3, OLMO3, EXAONE4),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, PHIMOE, GPT_OSS, HUNYUAN),
)
FAMILIES = {family.model_type: family for family in KNOWN}
VARIANTS = {("cohere", "use_qk_norm"): COHERE_NORMED}
"""What a family is where a key of its config is set."""
