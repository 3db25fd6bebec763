"""Families of the years before Llama, and their kin, under other names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfold.convert.families.translation import Cuts, Translation, fused, geometry, same
from kvfold.errors import UserError

if TYPE_CHECKING:  # what reads a config does without
    from torch import Tensor


def _chatglm(said: dict[str, Any]) -> dict[str, Any]:
    odd = {
        "rmsnorm is false": not said.get("rmsnorm", True),
        "post_layer_norm is false": not said.get("post_layer_norm", True),
        "apply_residual_connection_post_layernorm": bool(said.get("apply_residual_connection_post_layernorm")),
        "add_bias_linear": bool(said.get("add_bias_linear")),
        "position_encoding_2d, as in the first ChatGLM": "position_encoding_2d" in said,
    }
    if reasons := [reason for reason, there in odd.items() if there]:
        raise UserError(f"config.json: {'; '.join(reasons)}, which GLM cannot say: ChatGLM2, 3 and GLM-4 can be folded")
    return {
        **geometry(
            said,
            num_hidden_layers="num_layers,num_hidden_layers",
            vocab_size="padded_vocab_size,vocab_size",
            intermediate_size="ffn_hidden_size",
            max_position_embeddings="seq_length",
            rms_norm_eps="layernorm_epsilon",
            head_dim="kv_channels",
        ),
        "num_key_value_heads": said["multi_query_group_num" if said.get("multi_query_attention") else "num_attention_heads"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * (said.get("rope_ratio") or 1),
            "partial_rotary_factor": 0.5,
        },
        "attention_bias": bool(said.get("add_qkv_bias")),
    }


def _chatglm_cuts(said: dict[str, Any]) -> Cuts:
    width, heads = said["kv_channels"], said["num_attention_heads"]
    groups = said["multi_query_group_num"] if said.get("multi_query_attention") else heads
    return {"self_attn.qkv": fused(heads * width, groups * width), "model.rotary_pos_emb": {}}


CHATGLM = Translation(
    "chatglm",
    "ChatGLMModel",
    "glm",
    keys=_chatglm,
    names={
        "transformer.embedding.word_embeddings": "model.embed_tokens",
        "transformer.encoder.layers": "model.layers",
        "transformer.encoder.final_layernorm": "model.norm",
        "transformer.output_layer": "lm_head",
        "transformer.rotary_pos_emb": "model.rotary_pos_emb",
        "self_attention.query_key_value": "self_attn.qkv",
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    cuts=_chatglm_cuts,
    also=("ChatGLMForConditionalGeneration",),
)
"""ChatGLM2, ChatGLM3 and GLM-4 as their authors published them."""


def _gpt_geometry(said: dict[str, Any]) -> dict[str, Any]:
    heads, width = said["n_head"], said["n_embd"]
    return {
        "hidden_size": width,
        "num_hidden_layers": said["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("n_head_kv") or heads,
        "intermediate_size": said.get("n_inner") or 4 * width,
        "max_position_embeddings": said["n_positions"],
        "layer_norm_eps": said.get("layer_norm_epsilon", 1e-5),
        "hidden_act": said.get("activation_function", "gelu_new"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": said["rotary_dim"] * heads / width,
        },
    }


def _phi_cuts(said: dict[str, Any]) -> Cuts:
    width = said["n_embd"]
    return {"self_attn.qkv": fused(width, width // said["n_head"] * (said.get("n_head_kv") or said["n_head"]))}


PHI_MSFT = Translation(
    "phi-msft",
    "PhiForCausalLM",
    "phi",
    keys=_gpt_geometry,
    names={
        "transformer.embd.wte": "model.embed_tokens",
        "transformer.h": "model.layers",
        "lm_head.linear": "lm_head",
        "lm_head.ln": "model.final_layernorm",
        "ln": "input_layernorm",
        "mixer.Wqkv": "self_attn.qkv",
        "mixer.out_proj": "self_attn.dense",
        "mixer": "self_attn",
    },
    cuts=_phi_cuts,
)
"""Phi-1.5 and 2 as they were first published."""


def _gptj_cuts(said: dict[str, Any]) -> Cuts:
    width, turning = said["n_embd"] // said["n_head"], said["rotary_dim"]
    # GPT-J turns neighbouring numbers, Phi the first half of those that turn with the second
    order = [*range(0, turning, 2), *range(1, turning, 2), *range(turning, width)]

    def halves(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, width))[:, order].flatten(0, 1)  # (H·D, d) → (H, D, d) → (H·D, d)

    def no_bias(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(len(tensor))

    projections = {"q_proj": halves, "k_proj": halves, "v_proj": same, "dense": same}
    weights = {
        f"self_attn.{name}.weight": {f"self_attn.{name}.weight": cut, f"self_attn.{name}.bias": no_bias}
        for name, cut in projections.items()
    }
    return {**weights, "self_attn.bias": {}, "self_attn.masked_bias": {}}


GPTJ = Translation(
    "gptj",
    "GPTJForCausalLM",
    "phi",
    keys=_gpt_geometry,
    names={
        "transformer.wte": "model.embed_tokens",
        "transformer.h": "model.layers",
        "transformer.ln_f": "model.final_layernorm",
        "ln_1": "input_layernorm",
        "attn.out_proj": "self_attn.dense",
        "attn": "self_attn",
        "mlp.fc_in": "mlp.fc1",
        "mlp.fc_out": "mlp.fc2",
    },
    cuts=_gptj_cuts,
)
"""GPT-J: Phi without biases on attention, and with its RoPE's pairs in another order."""

GPT = (CHATGLM, PHI_MSFT, GPTJ)
