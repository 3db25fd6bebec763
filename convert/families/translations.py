"""Families that are one of transformers' under other names, fused otherwise or with multipliers: translated without loss.

Each is read, tensor by tensor, as the family that it is. None of its code runs, and none is needed afterwards.
"""

from typing import Any

from kvfold.convert.families.translation import GPT_NAMES, Cut, Cuts, Translation, fused, geometry, normalised
from kvfold.errors import UserError


def _dynamic(said: dict[str, Any]) -> dict[str, Any]:
    """InternLM writes its RoPE as `rotary`."""
    rotary = said.get("rotary") or {}
    if rotary.get("type", "origin") not in ("origin", "dynamic"):
        raise UserError(f"config.json: rotary is of type {rotary['type']!r:.40}, which no InternLM knows: check that file")
    kind = {"rope_theta": rotary["base"]} if rotary.get("base") else {}
    if rotary.get("type") == "dynamic":
        kind["rope_scaling"] = {"rope_type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)}
    return kind


INTERNLM = Translation(
    "internlm",
    "InternLMForCausalLM",
    "llama",
    keys=lambda said: {"attention_bias": bool(said.get("bias", True)), **_dynamic(said)},
)
"""InternLM 1: Llama with biases on attention."""


def _per_key_head(said: dict[str, Any]) -> Cuts:
    """InternLM2: a key head's queries, then its key, then its value: (G·(H/G + 2)·D, …)."""
    heads, groups = said["num_attention_heads"], said.get("num_key_value_heads") or said["num_attention_heads"]
    each = heads // groups + 2

    def part(start: int, stop: int) -> Cut:
        # (G·(H/G + 2)·D, …) → (G, H/G + 2, D, …) → (G·n·D, …)
        return lambda t: t.unflatten(0, (groups, each, -1))[:, start:stop].flatten(0, 2)

    return {
        "self_attn.wqkv": {
            "self_attn.q_proj": part(0, each - 2),
            "self_attn.k_proj": part(each - 2, each - 1),
            "self_attn.v_proj": part(each - 1, each),
        }
    }


INTERNLM2 = Translation(
    "internlm2",
    "InternLM2ForCausalLM",
    "llama",
    keys=lambda said: {"attention_bias": bool(said.get("bias", True))},
    names={
        "model.tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "attention.wqkv": "self_attn.wqkv",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    cuts=_per_key_head,
)
"""InternLM2 and 2.5: queries, keys and values are one matrix, key head by key head."""


def _internlm3(said: dict[str, Any]) -> dict[str, Any]:
    bias = bool(said.get("bias"))
    if bias != bool(said.get("qkv_bias")):
        raise UserError("config.json: qkv_bias and bias differ, and Llama has biases on all of attention or on none of it")
    return {"attention_bias": bias, "mlp_bias": bias}


INTERNLM3 = Translation("internlm3", "InternLM3ForCausalLM", "llama", keys=_internlm3)
"""InternLM3: Llama."""
XVERSE = Translation("xverse", "XverseForCausalLM", "llama")
"""XVERSE: Llama."""
AQUILA = Translation("aquila", "AquilaForCausalLM", "llama")
"""Aquila: Llama."""
YI = Translation("Yi", "YiForCausalLM", "llama", names={"ln1": "input_layernorm", "ln2": "post_attention_layernorm"})
"""Yi as it was first published: Llama with two norms under other names."""

BAICHUAN1_VOCABULARY, BAICHUAN2_VOCABULARY = 64000, 125696


def _baichuan(said: dict[str, Any]) -> dict[str, Any]:
    if "max_position_embeddings" not in said or said["hidden_size"] == 5120:
        raise UserError("it is a Baichuan of 13B, whose positions are ALiBi's, not a RoPE's: the 7B ones can be folded")
    if said["vocab_size"] not in (BAICHUAN1_VOCABULARY, BAICHUAN2_VOCABULARY):
        raise UserError(
            f"config.json: a Baichuan of {said['vocab_size']} tokens is neither Baichuan 1 ({BAICHUAN1_VOCABULARY}) nor 2 "
            f"({BAICHUAN2_VOCABULARY}), and only 2 normalises its output embedding: fold the one that it was made from"
        )
    return {}


BAICHUAN = Translation(
    "baichuan",
    "BaichuanForCausalLM",
    "llama",
    keys=_baichuan,
    names={"self_attn.W_pack": "self_attn.qkv"},
    cuts=lambda said: {
        "self_attn.qkv": fused(said["hidden_size"], said["hidden_size"]),
        **({"lm_head": {"lm_head": normalised}} if said["vocab_size"] == BAICHUAN2_VOCABULARY else {}),
    },
)
"""Baichuan 7B and Baichuan2 7B: queries, keys and values are one matrix; the second's output embedding is normalised."""


def _qwen(said: dict[str, Any]) -> dict[str, Any]:
    if said.get("visual"):
        raise UserError("it is a Qwen-VL of the first generation, whose vision tower kvfold does not know: fold Qwen-7B")
    if not said.get("no_bias", True) or said.get("rotary_pct", 1.0) != 1.0:
        raise UserError("config.json: no_bias is false or rotary_pct is not 1, which no published Qwen has: check that file")
    keys = geometry(
        said,
        hidden_size="hidden_size,n_embd",
        num_hidden_layers="num_hidden_layers,n_layer",
        num_attention_heads="num_attention_heads,n_head",
        vocab_size="vocab_size,padded_vocab_size",
        rms_norm_eps="layer_norm_epsilon",
        rope_theta="rotary_emb_base",
        max_position_embeddings="max_position_embeddings,n_positions,seq_length",
    )
    if said.get("use_dynamic_ntk") or said.get("use_logn_attn"):  # beyond that length, where Qwen2 does neither
        keys["max_position_embeddings"] = said.get("seq_length") or keys["max_position_embeddings"]
    inner = said.get("intermediate_size") or said.get("ffn_hidden_size")
    return {**keys, "intermediate_size": inner // 2 if inner else None, "hidden_act": "silu", "use_sliding_window": False}


QWEN = Translation(
    "qwen",
    "QWenLMHeadModel",
    "qwen2",
    keys=_qwen,
    names={
        **GPT_NAMES,
        "attn.c_attn": "self_attn.qkv",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
    cuts=lambda said: {"self_attn.qkv": fused(*[said.get("hidden_size") or said["n_embd"]] * 2)},
)
"""Qwen 1, up to the length from which it stretches its RoPE and its scores."""
EXAONE = Translation(
    "exaone",
    "ExaoneForCausalLM",
    "llama",
    keys=lambda said: {
        **geometry(said, num_hidden_layers="num_layers", hidden_act="activation_function", rms_norm_eps="layer_norm_epsilon"),
        "tie_word_embeddings": said.get("tie_word_embeddings", True),
    },
    names={
        **GPT_NAMES,
        "attn.attention": "self_attn",
        "self_attn.out_proj": "self_attn.o_proj",
        "mlp.c_fc_0": "mlp.gate_proj",
        "mlp.c_fc_1": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
)
"""EXAONE 3 and 3.5: Llama."""


def minicpm(said: dict[str, Any]) -> dict[str, Any]:
    """Granite's multipliers of a MiniCPM's config."""
    if said.get("sparse_config"):
        raise UserError("its attention leaves out most keys of long texts (sparse_config), and Granite has no such attention")
    width = said.get("head_dim") or said["hidden_size"] // said["num_attention_heads"]
    return {
        "embedding_multiplier": float(said.get("scale_emb", 1)),
        "residual_multiplier": said.get("scale_depth", 1) / said["num_hidden_layers"] ** 0.5,
        "logits_scaling": said["hidden_size"] / said.get("dim_model_base", 1),
        "attention_multiplier": width**-0.5,
        "tie_word_embeddings": said.get("tie_word_embeddings", True),
    }


MINICPM = Translation("minicpm", "MiniCPMForCausalLM", "granite", keys=minicpm, when=lambda said: not said.get("num_experts"))
"""MiniCPM 1, 2 and 4: Granite has the same multipliers, so that no weight changes."""


def _without_window(said: dict[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": bool(said.get("use_sliding_window")), **geometry(said, sliding_window="sliding_window")}


MIMO = Translation("mimo", "MiMoForCausalLM", "qwen2", keys=_without_window, cuts=lambda said: {"model.mtp_layers": {}})
"""MiMo: Qwen2. Its layer that predicts a second token, for speculation, is left out."""
ORION = Translation(
    "orion",
    "OrionForCausalLM",
    "stablelm",
    keys=lambda said: {"layer_norm_eps": said.get("rms_norm_eps", 1e-5), "use_qkv_bias": False, "partial_rotary_factor": 1.0},
)
"""Orion: StableLM whose RoPE turns whole heads."""

TRANSLATIONS = (INTERNLM, INTERNLM2, INTERNLM3, XVERSE, AQUILA, YI, BAICHUAN, QWEN, EXAONE, MINICPM, MIMO, ORION)
