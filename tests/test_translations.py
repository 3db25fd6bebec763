"""Families under other names: written here as their authors publish them, translated, and compared with the same model.

The foreign form is made by code of this file alone, from a tiny random model of transformers.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import invoke, save_model, save_tokens, tiny_config

State = dict[str, Tensor]
Config = dict[str, Any]
IDS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


def write(folder: Path, config: Config, tensors: State) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def foreign(state: State, *pairs: tuple[str, str]) -> State:
    """Names with parts exchanged, ours for theirs."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def fuse(state: State, fused: str, parts: tuple[str, ...], how: Callable[..., Tensor] = lambda *t: torch.cat(t)) -> State:
    """Tensors of a layer that are one matrix in the foreign form."""
    left = dict(state)
    for name in state:
        if parts[0] in name:
            left[name.replace(parts[0], fused)] = how(*(left.pop(name.replace(parts[0], part)) for part in parts))
    return left


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GPT_NAMES = (
    *(("model.layers", "transformer.h"), ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f")),
    *(("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")),
)
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 128, "intermediate_size": 96}
PLAIN = {**SIZES, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


def internlm2(state: State) -> tuple[Config, State]:
    def by_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [torch.cat([q[g * 16 : g * 16 + 16], k[g * 8 : g * 8 + 8], v[g * 8 : g * 8 + 8]]) for g in range(4)]
        return torch.cat(heads)  # four key heads of width 8, each with two query heads

    names = (
        *(("self_attn.wqkv", "attention.wqkv"), ("self_attn.o_proj", "attention.wo"), ("lm_head", "output")),
        *(("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2")),
        *(("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")),
        ("embed_tokens", "tok_embeddings"),
    )
    config = {**PLAIN, "model_type": "internlm2", "num_key_value_heads": 4, "bias": True}
    return config, foreign(fuse(state, "self_attn.wqkv", QKV, by_key_head), *names)


def internlm(state: State) -> tuple[Config, State]:
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    return {**PLAIN, "model_type": "internlm", "architectures": ["InternLMForCausalLM"]}, {**state, **buffers}


def yi(state: State) -> tuple[Config, State]:
    config = {**PLAIN, "model_type": "Yi", "num_key_value_heads": 4}
    return config, foreign(state, ("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2"))


def baichuan(state: State) -> tuple[Config, State]:
    config = {**PLAIN, "model_type": "baichuan", "vocab_size": 64000, "auto_map": {"AutoConfig": "code.BaichuanConfig"}}
    return config, fuse(state, "self_attn.W_pack", QKV)


def qwen(state: State) -> tuple[Config, State]:
    names = (
        *(*GPT_NAMES, ("self_attn.o_proj", "attn.c_proj"), ("self_attn", "attn")),
        *(("mlp.up_proj", "mlp.w1"), ("mlp.gate_proj", "mlp.w2"), ("mlp.down_proj", "mlp.c_proj")),
    )
    config = {**SIZES, "model_type": "qwen", "intermediate_size": 192, "layer_norm_epsilon": 1e-6, "seq_length": 128}
    return {**config, "no_bias": True}, foreign(fuse(state, "self_attn.c_attn", QKV), *names)


def exaone(state: State) -> tuple[Config, State]:
    names = (
        *(*GPT_NAMES, ("self_attn.o_proj", "attn.attention.out_proj"), ("self_attn", "attn.attention")),
        *(("mlp.gate_proj", "mlp.c_fc_0"), ("mlp.up_proj", "mlp.c_fc_1"), ("mlp.down_proj", "mlp.c_proj")),
    )
    theirs = {"num_layers": 2, "layer_norm_epsilon": 1e-6, "activation_function": "silu", "model_type": "exaone"}
    gone = ("num_hidden_layers", "rms_norm_eps")
    return {**{k: v for k, v in PLAIN.items() if k not in gone}, **theirs, "num_key_value_heads": 4}, foreign(state, *names)


def mimo(state: State) -> tuple[Config, State]:
    second = {"model.mtp_layers.0.input_proj.weight": torch.ones(4, 8)}
    return {**PLAIN, "model_type": "mimo", "head_dim": 8, "use_sliding_window": False}, {**state, **second}


def molmo(state: State) -> tuple[Config, State]:
    fused = fuse(fuse(state, "self_attn.att_proj", QKV), "mlp.ff_proj", ("mlp.up_proj", "mlp.gate_proj"))
    names = (
        *(("model.layers", "model.transformer.blocks"), ("embed_tokens.weight", "transformer.wte.embedding")),
        *(("model.norm", "model.transformer.ln_f"), ("lm_head", "model.transformer.ff_out"), ("self_attn.att_", "att_")),
        *(("self_attn.o_proj", "attn_out"), ("mlp.ff_proj", "ff_proj"), ("mlp.down_proj", "ff_out")),
        *(("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ff_norm")),
    )
    own = {"model_type": "molmo", "qkv_bias": True, "layer_norm_type": "rms", "layer_norm_eps": 1e-6, "norm_after": False}
    tower = {"model.vision_backbone.x.weight": torch.ones(3), "model.transformer.wte.new_embedding": torch.ones(4, 64)}
    return {**PLAIN, **own, "num_key_value_heads": 4, "intermediate_size": 192}, {**foreign(fused, *names), **tower}


def llava(state: State) -> tuple[Config, State]:
    config = {**PLAIN, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "clip"}
    return config, {**state, "model.mm_projector.0.weight": torch.ones(3, 3)}


def phi3_v(state: State) -> tuple[Config, State]:
    return {**PLAIN, "model_type": "phi3_v", "pad_token_id": 0, "rms_norm_eps": 1e-5}, {
        **state,
        "model.vision_embed_tokens.glb_GN": torch.ones(1, 2),
    }


def internvl_chat(state: State) -> tuple[Config, State]:
    inner, tensors = internlm2(state)
    config = {"model_type": "internvl_chat", "llm_config": {**inner, "architectures": ["InternLM2ForCausalLM"]}}
    tower = {"vision_model.embeddings.x": torch.ones(2), "mlp1.0.weight": torch.ones(2)}
    return config, {**{f"language_model.{name}": t for name, t in tensors.items()}, **tower}


def janus(state: State) -> tuple[Config, State]:
    config = {"model_type": "multi_modality", "language_config": {**PLAIN, "model_type": "llama"}}
    return config, {**{f"language_model.{name}": t for name, t in state.items()}, "aligner.x": torch.ones(2)}


def chatglm(state: State) -> tuple[Config, State]:
    names = (
        *(("model.layers", "transformer.encoder.layers"), ("model.norm", "transformer.encoder.final_layernorm")),
        *(("model.embed_tokens", "transformer.embedding.word_embeddings"), ("lm_head", "transformer.output_layer")),
        *(("self_attn.query_key_value", "self_attention.query_key_value"), ("self_attn.o_proj", "self_attention.dense")),
        *(("mlp.gate_up_proj", "mlp.dense_h_to_4h"), ("mlp.down_proj", "mlp.dense_4h_to_h")),
    )
    config = {
        **{"model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 64, "num_attention_heads": 8},
        **{"num_layers": 2, "padded_vocab_size": 128, "ffn_hidden_size": 96, "kv_channels": 8, "seq_length": 128},
        **{"multi_query_attention": True, "multi_query_group_num": 2, "layernorm_epsilon": 1e-6, "add_qkv_bias": True},
        **{"rope_ratio": 50, "pad_token_id": 0, "rmsnorm": True},
    }
    buffer = {"transformer.rotary_pos_emb.inv_freq": torch.ones(2)}
    return config, {**foreign(fuse(state, "self_attn.query_key_value", QKV), *names), **buffer}


GPT = {"n_embd": 64, "n_head": 8, "n_layer": 2, "n_inner": 96, "n_positions": 128, "rotary_dim": 4, "vocab_size": 128}


def phi_msft(state: State) -> tuple[Config, State]:
    names = (
        *(("model.layers", "transformer.h"), ("model.embed_tokens", "transformer.embd.wte"), ("lm_head", "lm_head.linear")),
        *(("model.final_layernorm", "lm_head.ln"), ("input_layernorm", "ln"), ("self_attn.dense", "mixer.out_proj")),
        ("self_attn.Wqkv", "mixer.Wqkv"),
    )
    config = {**GPT, "model_type": "phi-msft", "architectures": ["PhiForCausalLM"], "layer_norm_epsilon": 1e-5}
    return {**config, "activation_function": "gelu_new"}, foreign(fuse(state, "self_attn.Wqkv", QKV), *names)


def part_turning(theta: float) -> Config:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}}


RENAMED: dict[str, tuple[Callable[[State], tuple[Config, State]], str, Config]] = {
    "internlm2": (internlm2, "llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "internlm": (internlm, "llama", {"attention_bias": True}),
    "internlm3": (lambda state: ({**PLAIN, "model_type": "internlm3", "head_dim": 8}, state), "llama", {}),
    "xverse": (lambda state: ({**PLAIN, "model_type": "xverse"}, state), "llama", {}),
    "aquila": (lambda state: ({**PLAIN, "model_type": "aquila"}, state), "llama", {}),
    "Yi": (yi, "llama", {"num_key_value_heads": 4}),
    "baichuan": (baichuan, "llama", {"vocab_size": 64000}),
    "qwen": (qwen, "qwen2", {}),
    "exaone": (exaone, "llama", {"num_key_value_heads": 4}),
    "mimo": (mimo, "qwen2", {}),
    "chatglm": (chatglm, "glm", {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, **part_turning(500000.0)}),
    "phi-msft": (phi_msft, "phi", part_turning(10000.0)),
    "molmo": (molmo, "qwen2", {"num_key_value_heads": 4}),
    "llava": (llava, "llama", {}),
    "phi3_v": (phi3_v, "phi3", {}),
    "internvl_chat": (internvl_chat, "llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "multi_modality": (janus, "llama", {}),
}
PARTS = ("molmo", "llava", "phi3_v", "internvl_chat", "multi_modality")


def make(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """The same random model as transformers has it and as the family publishes it."""
    turn, family, changes = RENAMED[name]
    ours = save_model(tmp_path / "ours", family, **changes)
    return ours, write(tmp_path / "theirs", *turn(load_file(ours / "model.safetensors")))


@pytest.mark.parametrize("name", RENAMED)
def test_a_family_under_another_name_is_translated_exactly(tmp_path: Path, name: str) -> None:
    ours, theirs = make(tmp_path, name)
    part = ("--part", "language") if name in PARTS else ()
    code, said = invoke("convert", theirs, tmp_path / "out", "--to", "source", *part)
    assert code == 0, said
    assert "no tokenizer.json" in said
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == RENAMED[name][1]
    assert not {"auto_map", "translated_from", "part_of", "whole_can_stay"} & config.keys()
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(ours / "model.safetensors").keys()
    assert torch.equal(logits(tmp_path / "out"), logits(ours))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_not_taken_for_the_whole(tmp_path: Path, name: str) -> None:
    _, theirs = make(tmp_path, name)
    code, said = invoke("plan", theirs, "--to", "mqa")
    assert code == 2
    assert f"{name} is a model of several parts" in said
    assert "--part language" in said


def test_baichuan2_normalises_its_output_embedding(tmp_path: Path) -> None:
    ours = save_model(
        tmp_path / "ours", "llama", vocab_size=125696, hidden_size=16, num_attention_heads=2, num_key_value_heads=2
    )
    state = load_file(ours / "model.safetensors")
    head = state["lm_head.weight"].clone()
    config = {**baichuan(state)[0], "vocab_size": 125696, "hidden_size": 16, "num_attention_heads": 2}
    theirs = write(tmp_path / "theirs", config, fuse(state, "self_attn.W_pack", QKV))
    assert invoke("convert", theirs, tmp_path / "out", "--to", "source")[0] == 0
    written = load_file(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(written["lm_head.weight"], head / head.norm(dim=1, keepdim=True))
    assert torch.equal(written["model.embed_tokens.weight"], state["model.embed_tokens.weight"])


SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}


def scaled_by_hand(state: State, downs: tuple[str, ...]) -> State:
    """The weights of a MiniCPM with its multipliers in them: 12 on the embedding, 1.4/√2 on branches, 64/16 below logits."""
    state = dict(state)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] / 4
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] * 12
    return {name: t * 1.4 / 2**0.5 if any(down in name for down in downs) else t for name, t in state.items()}


@pytest.mark.parametrize("experts", [False, True])
def test_minicpms_multipliers_are_kept(tmp_path: Path, experts: bool) -> None:
    family, downs = ("mixtral", ("o_proj", ".w2.")) if experts else ("llama", ("o_proj", "down_proj"))
    ours = save_model(tmp_path / "ours", family, rope_theta=10000.0)
    state = {k: v for k, v in load_file(ours / "model.safetensors").items() if k != "lm_head.weight"}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] * 3  # the random one is small beside 1.4
    own = {"num_experts": 4, "num_experts_per_tok": 2} if experts else {}
    config = {**PLAIN, **SCALES, **own, "model_type": "minicpm", "rms_norm_eps": 1e-5 if experts else 1e-6}
    theirs = write(tmp_path / "theirs", {**config, "tie_word_embeddings": True}, foreign(state, ("block_sparse_moe", "mlp")))
    save_file(scaled_by_hand(state, downs), ours / "model.safetensors", {"format": "pt"})
    assert invoke("convert", theirs, tmp_path / "out", "--to", "source")[0] == 0
    written = load_file(tmp_path / "out/model.safetensors")
    assert experts or all(
        torch.equal(written[name], state[name]) for name in state
    )  # Granite's multipliers stand in its config
    torch.testing.assert_close(logits(tmp_path / "out"), logits(ours), atol=1e-5, rtol=1e-5)


class DeepseekMoE(nn.Module):
    """Four experts of which the best two count by their share of all, unnormalised, and two shared ones as one MLP."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        def mlp(which: str) -> Tensor:
            gate, up, down = (self.state[f"{which}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

        share = (x @ self.state["gate.weight"].T).softmax(-1)
        kept = share * (share >= share.topk(2).values[..., -1:])
        return mlp("shared_experts") + sum(kept[..., n : n + 1] * mlp(f"experts.{n}") for n in range(4))


@pytest.mark.parametrize("within", [False, True])
def test_deepseeks_experts(tmp_path: Path, within: bool) -> None:
    """By themselves, and as the language model of DeepSeek-VL2."""
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama"))
    random = torch.Generator().manual_seed(3)
    shapes = {f"experts.{n}": 24 for n in range(4)} | {"shared_experts": 48}
    moe = {f"{w}.{p}_proj.weight": torch.randn(r, 64, generator=random) for w, r in shapes.items() for p in ("gate", "up")}
    moe |= {f"{w}.down_proj.weight": torch.randn(64, r, generator=random) for w, r in shapes.items()}
    moe = {name: t * 0.1 for name, t in moe.items()} | {"gate.weight": torch.randn(4, 64, generator=random)}
    state = {k: v for k, v in model.state_dict().items() if ".layers.1.mlp." not in k}
    model.model.layers[1].mlp = DeepseekMoE(moe)
    config = {
        **{**PLAIN, "model_type": "deepseek", "num_key_value_heads": 8, "moe_intermediate_size": 24, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": False},
    }
    tensors = {**state, **{f"model.layers.1.mlp.{k}": v for k, v in moe.items()}}
    if within:
        config = {"model_type": "deepseek_vl_v2", "language_config": {**config, "model_type": "deepseek_v2"}}
        tensors = {**{f"language.{name}": t for name, t in tensors.items()}, "vision.x": torch.ones(2)}
    theirs = write(tmp_path / "theirs", config, tensors)
    code, said = invoke("plan", theirs, "--to", "mqa")
    assert code == (2 if within else 0) and ("deepseek_vl_v2 is a model of several parts" in said) == within
    part = ("--part", "language") if within else ()
    assert invoke("convert", theirs, tmp_path / "out", "--to", "source", *part)[0] == 0
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_orions_layernorms(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama"))
    torch.manual_seed(4)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.LayerNorm(64), nn.LayerNorm(64)
    model.model.norm = nn.LayerNorm(64)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    config = {**PLAIN, "model_type": "orion", "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 10000.0}
    theirs = write(tmp_path / "theirs", config, model.state_dict())
    assert invoke("convert", theirs, tmp_path / "out", "--to", "source")[0] == 0
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_gptjs_pairs_are_put_in_phis_order(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **GPT, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn" in name or "bias" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "theirs")
    wanted = logits(tmp_path / "theirs")
    code, said = invoke("convert", tmp_path / "theirs", tmp_path / "out", "--to", "source")
    assert code == 0, said
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "phi"
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, atol=1e-5, rtol=1e-5)


def test_a_translated_source_is_folded_healed_and_measured_like_any_other(tmp_path: Path) -> None:
    ours, theirs = make(tmp_path, "internlm2")
    text = save_tokens(tmp_path / "text.safetensors", 8, 32)
    how = ("--to", "mla", "--kv-budget", "50%", "--calibrate", text, "--heal-steps", "2", "--heal-batch-tokens", "64")
    for source, out in ((ours, "a"), (theirs, "b")):
        code, said = invoke("convert", source, tmp_path / out, *how)
        assert code == 0, said
    folded = [load_file(tmp_path / out / "model.safetensors") for out in "ab"]
    assert folded[0].keys() == folded[1].keys()
    assert all(torch.equal(folded[0][name], folded[1][name]) for name in folded[0])
    code, said = invoke("evaluate", tmp_path / "b", "--on", text, "--quick", "--json", tmp_path / "report.json")
    assert code == 0, said
    damage = json.loads((tmp_path / "report.json").read_text())["models"][0]["damage_nats"]
    assert invoke("evaluate", tmp_path / "a", "--on", text, "--quick", "--json", tmp_path / "report.json")[0] == 0
    assert damage == json.loads((tmp_path / "report.json").read_text())["models"][0]["damage_nats"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "baichuan", "hidden_size": 5120}, "ALiBi"),
        ({"model_type": "baichuan", "vocab_size": 70000}, "neither Baichuan 1 .64000. nor 2"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "as in the first ChatGLM"),
        ({"model_type": "qwen", "visual": {"layers": 48}}, "Qwen-VL"),
        ({"model_type": "minicpm", "sparse_config": {"dense_len": 8192}}, "sparse_config"),
        ({"model_type": "deepseek", "scoring_func": "sigmoid", "n_shared_experts": 2}, "scoring_func"),
        ({"model_type": "deepseek", "n_shared_experts": 2}, "n_routed_experts"),
        ({"model_type": "internlm2", "architectures": ["InternLM2ForRewardModel"]}, "InternLM2ForRewardModel"),
        ({"model_type": "internlm3", "qkv_bias": True}, "qkv_bias"),
        ({"model_type": "phi-msft", **GPT, "rotary_dim": float("inf")}, "no share of a head"),
        ({"model_type": "exaone", "num_layers": 2, "activation_function": "swoosh"}, "no activation 'swoosh'"),
        ({"model_type": "internlm", "rotary": {"base": 10000, "type": "linear"}}, "rotary is of type 'linear'"),
        ({"model_type": "qwen", "quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_what_a_translation_cannot_say_is_refused(tmp_path: Path, config: Config, reason: str) -> None:
    write(tmp_path / "theirs", {**PLAIN, **config}, {"x": torch.ones(1)})
    code, said = invoke("plan", tmp_path / "theirs", "--to", "mqa")
    assert code == 2
    assert re.search(reason, said), said


def test_tensors_that_no_rule_knows_are_refused(tmp_path: Path) -> None:
    _, theirs = make(tmp_path, "qwen")
    state = load_file(theirs / "model.safetensors")
    save_file({**state, "transformer.h.0.attn.extra.weight": torch.ones(2)}, theirs / "model.safetensors")
    code, said = invoke("convert", theirs, tmp_path / "out", "--to", "source")
    assert code == 2
    assert "has no place" in said
    assert not (tmp_path / "out").exists()
    save_file({**state, "model.layers.0.self_attn.qkv.weight": torch.ones(2)}, theirs / "model.safetensors")
    code, said = invoke("convert", theirs, tmp_path / "out", "--to", "source")
    assert code == 2
    assert "once more" in said or "does not mean" in said
