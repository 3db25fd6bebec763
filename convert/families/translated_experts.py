"""Families with experts under other names."""

from typing import Any

from kvfold.convert.families.translation import Cuts, Translation, same, scaled
from kvfold.convert.families.translations import minicpm
from kvfold.errors import UserError


def _minicpm_cuts(said: dict[str, Any]) -> Cuts:
    scales = minicpm(said)
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
        "mlp.gate": {"mlp.gate": same, "mlp.shared_expert_gate": lambda t: t.new_zeros(t[:1].shape)},
        "mlp.shared_experts.down_proj": {"mlp.shared_expert.down_proj": scaled(2.0)},
        "mlp.shared_experts": {"mlp.shared_expert": same},
    },
)
"""DeepSeek-MoE 16B: multi-head attention, and experts as Qwen2-MoE has them."""

EXPERTS = (MINICPM_MOE, DEEPSEEK)
