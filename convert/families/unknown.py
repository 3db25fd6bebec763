"""What stands in the way of a family that kvfold does not know, read off its config.json."""

import difflib
from collections.abc import Sequence
from typing import Any

_KEYS = {
    "kv_lora_rank": "its attention is MLA already",
    "attn_logit_softcapping": "its attention scores are soft-capped",
    "qk_layernorm": "queries and keys go through norms before they meet",
    "use_qk_norm": "queries and keys go through norms before they meet",
    "alibi": "its positions are ALiBi's, not a RoPE's",
    "attn_config": "its attention is described in a way of its own (attn_config)",
    "linear_attn_config": "some of its layers are no softmax attention",
    "linear_num_key_heads": "some of its layers are no softmax attention",
    "mamba_num_heads": "some of its layers are no softmax attention",
    "attention_chunk_size": "some of its layers attend in chunks",
    "no_rope_layers": "some of its layers have no RoPE",
    "query_pre_attn_scalar": "its scores have a scale of their own",
    "attention_multiplier": "its scores have a scale of their own",
    "scale_emb": "embedding, residuals and logits have scales of their own",
    "logit_scale": "its logits have a scale of their own",
    "text_config": "its language model is one part of several (text_config)",
    "language_config": "its language model is one part of several (language_config)",
    "llm_config": "its language model is one part of several (llm_config)",
    "vision_config": "it has a vision tower beside the language model",
    "num_experts": "its layers have experts",
    "num_local_experts": "its layers have experts",
    "n_routed_experts": "its layers have experts",
}
"""Keys that say so when they are there and neither null, zero nor false."""
_NORMED = ("qwen3", "olmo2", "olmo3", "gemma3", "gemma4", "exaone4", "hunyuan", "minimax", "chameleon", "stablelm_epoch")
_FUSED = ("gpt_neox", "falcon", "internlm2", "baichuan", "qwen", "chatglm", "mpt", "bloom", "gpt2", "gpt_bigcode")
_UNTURNED = {"gpt2": "learned ones", "opt": "learned ones", "gpt_bigcode": "learned ones", "bloom": "ALiBi's", "mpt": "ALiBi's"}
_NORMS = ("phi", "gpt_neox", "falcon", "cohere", "cohere2", "mpt", "bloom", "gpt2", "opt", "orion")
_INTERLEAVED = ("cohere", "cohere2", "gptj", "ernie4_5", "chatglm", "glm", "glm4")


def obstacles(config: dict[str, Any]) -> list[str]:
    """What of this model the attention of the known families cannot say, each in a few words."""
    name, text = str(config.get("model_type")), config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    inner = str(nested.get("model_type", name))
    found = [reason for key, reason in _KEYS.items() if config.get(key) or nested.get(key)]
    kinds = config.get("layer_types") or nested.get("layer_types")
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        found.append(f"its layers are of several kinds ({', '.join(sorted(set(map(str, kinds))))})")
    partial = next((config[key] for key in ("partial_rotary_factor", "rotary_pct", "rotary_dim") if config.get(key)), 1)
    if partial not in (1, 1.0):
        found.append("its RoPE turns a part of each head only")
    if any(each.startswith(_NORMED) for each in (name, inner)):
        found.append("queries and keys go through norms before they meet")
    if name in _UNTURNED:
        found.append(f"its positions are {_UNTURNED[name]}, not a RoPE's")
    if name in _NORMS:
        found.append("its norms are LayerNorms")
    if name in _INTERLEAVED:
        found.append("its RoPE turns neighbouring numbers, interleaved")
    if name.startswith("gemma"):
        found.append("its norms multiply by one more than their weight, and its embedding has a scale")
    if name in _FUSED:
        found.append("queries, keys and values are one matrix")
    return list(dict.fromkeys(found))


def describe(config: dict[str, Any], known: Sequence[str]) -> str:
    """The refusal of a family that is not known: what stands in the way, or what the name was perhaps meant to be."""
    model_type = config.get("model_type")
    text = f"model_type {model_type!r:.60} is not a family kvfold knows."
    if reasons := obstacles(config):
        text += f" What stands in the way: {'; '.join(reasons)}."
    elif not _in_transformers(model_type):
        text += " transformers has no class of that name."
        close = difflib.get_close_matches(str(model_type), known, n=1, cutoff=0.7)
        text += f" The nearest is {close[0]}." if close else ""
    return f"{text} Known: {', '.join(known)}; CONTRIBUTING.md shows how to add one"


def _in_transformers(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING
