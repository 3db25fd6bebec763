"""Families that are one of transformers' under other names, fused otherwise or with multipliers: translated without loss.

Each is read, tensor by tensor, as the family that it is. None of its code runs, and none is needed afterwards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import UserError

Cut = Callable[[Tensor], Tensor]
"""What makes a tensor of one that is stored. Biases are cut like the rows that they belong to."""
Cuts = Mapping[str, Mapping[str, Cut]]


@dataclass(frozen=True)
class Translation:
    """A family under another name.

    Attributes:
        model_type, architecture: what its config.json calls itself.
        into: the `model_type` of the family that it is.
        keys: from its config.json, what the family's config wants beside `SHARED`. Raises UserError for what that cannot say.
        names: parts of the names of its tensors, between dots → what they are called in the family.
        cuts: from its config.json, parts of names (after `names`) → what is made of that tensor, and how. Nothing drops it.
        when: read from its config.json whether it is this one of several families of that name.
        part_of: whether it is a model of several parts, of which the language model alone is read.
    """

    model_type: str
    architecture: str
    into: str
    keys: Callable[[dict[str, Any]], dict[str, Any]] = lambda said: {}
    names: Mapping[str, str] = field(default_factory=dict)
    cuts: Callable[[dict[str, Any]], Cuts] = lambda said: {}
    when: Callable[[dict[str, Any]], bool] = lambda said: True
    part_of: bool = False


SHARED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "hidden_act", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("torch_dtype", "dtype", "quantization_config", "compression_config"),
)
"""Keys that mean the same everywhere."""
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
"""What they mean where a config leaves them out, as in Llama's; the classes of other families have defaults of their own."""


def same(tensor: Tensor) -> Tensor:
    return tensor


def rows(start: int, stop: int) -> Cut:
    return lambda tensor: tensor[start:stop]


def thirds(said: dict[str, Any]) -> Mapping[str, Cut]:
    """Queries, keys and values of as many heads, one below the other."""
    width = said["hidden_size"]
    return {f"self_attn.{role}_proj": rows(n * width, (n + 1) * width) for n, role in enumerate("qkv")}


def scaled(factor: float) -> Cut:
    return lambda tensor: (tensor.float() * factor).to(tensor.dtype)


def normalised(tensor: Tensor) -> Tensor:
    """Every row divided by its length, as the model does when it runs."""
    return torch.nn.functional.normalize(tensor)


def _geometry(said: dict[str, Any], **theirs: str) -> dict[str, Any]:
    """Shared keys under other names: ours=theirs, several with commas. Those that are not there stay away."""
    found = {ours: next((said[k] for k in names.split(",") if said.get(k) is not None), None) for ours, names in theirs.items()}
    return {key: value for key, value in found.items() if value is not None}


def _dynamic(said: dict[str, Any]) -> dict[str, Any]:
    """InternLM writes its RoPE as `rotary`."""
    rotary = said.get("rotary") or {}
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
        "self_attn.qkv": thirds(said),
        **({"lm_head": {"lm_head": normalised}} if said["vocab_size"] == BAICHUAN2_VOCABULARY else {}),
    },
)
"""Baichuan 7B and Baichuan2 7B: queries, keys and values are one matrix; the second's output embedding is normalised."""


def _qwen(said: dict[str, Any]) -> dict[str, Any]:
    if said.get("visual"):
        raise UserError("it is a Qwen-VL of the first generation, whose vision tower kvfold does not know: fold Qwen-7B")
    if not said.get("no_bias", True) or said.get("rotary_pct", 1.0) != 1.0:
        raise UserError("config.json: no_bias is false or rotary_pct is not 1, which no published Qwen has: check that file")
    keys = _geometry(
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
        "transformer.wte": "model.embed_tokens",
        "transformer.h": "model.layers",
        "transformer.ln_f": "model.norm",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_attn": "self_attn.qkv",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
    cuts=lambda said: {"self_attn.qkv": thirds({"hidden_size": said.get("hidden_size") or said.get("n_embd")})},
)
"""Qwen 1, up to the length from which it stretches its RoPE and its scores."""
EXAONE = Translation(
    "exaone",
    "ExaoneForCausalLM",
    "llama",
    keys=lambda said: {
        **_geometry(said, num_hidden_layers="num_layers", hidden_act="activation_function", rms_norm_eps="layer_norm_epsilon"),
        "tie_word_embeddings": said.get("tie_word_embeddings", True),
    },
    names={
        "transformer.wte": "model.embed_tokens",
        "transformer.h": "model.layers",
        "transformer.ln_f": "model.norm",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.attention": "self_attn",
        "self_attn.out_proj": "self_attn.o_proj",
        "mlp.c_fc_0": "mlp.gate_proj",
        "mlp.c_fc_1": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
)
"""EXAONE 3 and 3.5: Llama."""


def _minicpm(said: dict[str, Any]) -> dict[str, Any]:
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


MINICPM = Translation("minicpm", "MiniCPMForCausalLM", "granite", keys=_minicpm, when=lambda said: not said.get("num_experts"))
"""MiniCPM 1, 2 and 4: Granite has the same multipliers, so that no weight changes."""


def _minicpm_cuts(said: dict[str, Any]) -> Cuts:
    scales = _minicpm(said)
    before, branch, after = (scales[key] for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling"))
    embedding, head = {"model.embed_tokens": scaled(before)}, {"lm_head": scaled(1 / after)}
    tied = scales["tie_word_embeddings"]
    return {
        "model.embed_tokens": {**embedding, **head} if tied else embedding,
        "lm_head": {} if tied else head,
        "self_attn.o_proj": {"self_attn.o_proj": scaled(branch)},
        "w2": {"w2": scaled(branch)},
    }


MINICPM_MOE = Translation(
    "minicpm",
    "MiniCPMForCausalLM",
    "mixtral",
    keys=lambda said: {
        "num_local_experts": said["num_experts"],
        "num_experts_per_tok": said.get("num_experts_per_tok", 2),
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    names={"mlp.gate": "block_sparse_moe.gate", "mlp.experts": "block_sparse_moe.experts"},
    cuts=_minicpm_cuts,
    when=lambda said: bool(said.get("num_experts")),
)
"""MiniCPM-MoE: Mixtral has no multipliers, so that they go into the weights, which are rounded once."""


def _without_window(said: dict[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": bool(said.get("use_sliding_window")), **_geometry(said, sliding_window="sliding_window")}


MIMO = Translation("mimo", "MiMoForCausalLM", "qwen2", keys=_without_window, cuts=lambda said: {"model.mtp_layers": {}})
"""MiMo: Qwen2. Its layer that predicts a second token, for speculation, is left out."""
ORION = Translation(
    "orion",
    "OrionForCausalLM",
    "stablelm",
    keys=lambda said: {"layer_norm_eps": said.get("rms_norm_eps", 1e-5), "use_qkv_bias": False, "partial_rotary_factor": 1.0},
)
"""Orion: StableLM whose RoPE turns whole heads."""


def _deepseek(said: dict[str, Any]) -> dict[str, Any]:
    odd = {
        "moe_layer_freq is not 1": said.get("moe_layer_freq", 1) != 1,
        "scoring_func is not softmax": said.get("scoring_func", "softmax") != "softmax",
        "topk_method is not greedy": said.get("topk_method", "greedy") != "greedy",
        "routed_scaling_factor is not 1": said.get("routed_scaling_factor", 1.0) != 1.0,
        "it has no shared experts": not said.get("n_shared_experts"),
        "its attention has biases": bool(said.get("attention_bias")),
    }
    if reasons := [reason for reason, there in odd.items() if there]:
        raise UserError(f"config.json: {'; '.join(reasons)}, which Qwen2-MoE cannot say")
    return {
        "num_experts": said["n_routed_experts"],
        "num_experts_per_tok": said["num_experts_per_tok"],
        "norm_topk_prob": bool(said.get("norm_topk_prob")),
        "moe_intermediate_size": said["moe_intermediate_size"],
        "shared_expert_intermediate_size": said["n_shared_experts"] * said["moe_intermediate_size"],
        "mlp_only_layers": list(range(said.get("first_k_dense_replace", 0))),
        "decoder_sparse_step": 1,
        "qkv_bias": False,
        "use_sliding_window": False,
    }


DEEPSEEK = Translation(
    "deepseek",
    "DeepseekForCausalLM",
    "qwen2_moe",
    keys=_deepseek,
    cuts=lambda said: {
        # Qwen2-MoE has a gate before its shared expert: with weights of zero it halves what passes, exactly
        "mlp.gate": {"mlp.gate": same, "mlp.shared_expert_gate": lambda t: torch.zeros_like(t[:1])},
        "mlp.shared_experts.down_proj": {"mlp.shared_expert.down_proj": scaled(2.0)},
        "mlp.shared_experts": {"mlp.shared_expert": same},
    },
)
"""DeepSeek-MoE 16B: multi-head attention, and experts as Qwen2-MoE has them."""

TRANSLATIONS = (*(INTERNLM, INTERNLM2, INTERNLM3, XVERSE, BAICHUAN, QWEN, EXAONE, MINICPM, MINICPM_MOE, MIMO, ORION, DEEPSEEK),)
