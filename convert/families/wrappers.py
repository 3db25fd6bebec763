"""Models of several parts, one of which is a language model of a known family: vision and audio towers, projectors, heads.

Where transformers has the class, GQA and MQA leave the model whole: the language model is folded and the rest copied. Of the
others, and for the other targets, the language model is taken out into a checkpoint of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvfold.convert.families.translation import Cuts, Translation, fused, rows

LANGUAGE = {
    "language_model.": "",
    "language.": "",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "model.layers.": "model.layers.",
    "model.embed_tokens.": "model.embed_tokens.",
    "model.norm.": "model.norm.",
    "lm_head.": "lm_head.",
}
"""What the names of a language model's tensors begin with inside of another one, older and newer → by itself."""
TEXT_TYPES = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""What a language model is called inside of another one → by itself: on text, RoPE in three directions is RoPE."""


@dataclass(frozen=True)
class Wrapper:
    """A model of which one part is a language model.

    Attributes:
        model_type: what its config.json calls it.
        text: key of the language model's config in it. Where that is not there, config.json is flat.
        inner: the language model's `model_type` where its config does not name one.
        stays: whether transformers has the whole model's class, so that it can be written whole.
        renamed: what a language model's `model_type` is read as, beside `TEXT_TYPES`.
    """

    model_type: str
    text: str = "text_config"
    inner: str = "llama"
    stays: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)


WRAPPERS = {
    each.model_type: each
    for each in (
        Wrapper("llava"),
        Wrapper("llava_next"),
        Wrapper("llava_next_video"),
        Wrapper("llava_onevision", inner="qwen2"),
        Wrapper("idefics3"),
        Wrapper("smolvlm"),
        Wrapper("mistral3", inner="mistral"),
        Wrapper("internvl", inner="qwen2"),
        Wrapper("gemma3", inner="gemma3_text"),
        Wrapper("aya_vision", inner="cohere2"),
        Wrapper("qwen2_vl", inner="qwen2"),
        Wrapper("qwen2_5_vl", inner="qwen2"),
        Wrapper("qwen3_vl", inner="qwen3"),
        Wrapper("qwen2_audio", inner="qwen2"),
        Wrapper("internvl_chat", text="llm_config", stays=False),
        Wrapper("multi_modality", text="language_config", stays=False),
        Wrapper("deepseek_vl_v2", text="language_config", stays=False, renamed={"deepseek_v2": "deepseek"}),
    )
}


def _molmo(said: dict[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": said["intermediate_size"] // 2,
        "rms_norm_eps": said.get("layer_norm_eps", 1e-5),
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _molmo_cuts(said: dict[str, Any]) -> Cuts:
    width, inner = said["hidden_size"] // said["num_attention_heads"], said["intermediate_size"] // 2
    return {
        "self_attn.qkv": fused(said["hidden_size"], width * (said.get("num_key_value_heads") or said["num_attention_heads"])),
        "mlp.up_gate": {"mlp.up_proj": rows(0, inner), "mlp.gate_proj": rows(inner, 2 * inner)},
        "model.transformer.wte.new_embedding": {},
        "model.vision_backbone": {},
    }


MOLMO = Translation(
    "molmo",
    "MolmoForCausalLM",
    "qwen2",
    keys=_molmo,
    names={
        "model.transformer.wte.embedding": "model.embed_tokens.weight",
        "model.transformer.blocks": "model.layers",
        "model.transformer.ln_f": "model.norm",
        "model.transformer.ff_out": "lm_head",
        "attn_norm": "input_layernorm",
        "ff_norm": "post_attention_layernorm",
        "att_proj": "self_attn.qkv",
        "attn_out": "self_attn.o_proj",
        "ff_out": "mlp.down_proj",
        "ff_proj": "mlp.up_gate",
    },
    cuts=_molmo_cuts,
    when=lambda said: bool(said.get("qkv_bias")) and not said.get("norm_after") and said.get("layer_norm_type") == "rms",
    part_of=True,
)
"""Molmo 7B-D: the language model is Qwen2's."""
PHI3_V = Translation(
    "phi3_v",
    "Phi3VForCausalLM",
    "phi3",
    keys=lambda said: {
        **{key: said[key] for key in ("original_max_position_embeddings", "sliding_window") if key in said},
        "rope_scaling": {**said["rope_scaling"], "type": "longrope"} if said.get("rope_scaling") else None,
    },
    cuts=lambda said: {"model.vision_embed_tokens": {}},
    part_of=True,
)
"""Phi-3-vision: Phi-3 with a vision tower beside its embedding."""
LLAVA = Translation(
    "llava",
    "LlavaLlamaForCausalLM",
    "llama",
    cuts=lambda said: {"model.mm_projector": {}, "model.vision_tower": {}, "model.image_newline": {}},
    when=lambda said: "text_config" not in said,
    part_of=True,
)
"""LLaVA as its authors published it: Llama with a projector beside its layers."""

PARTS = (MOLMO, PHI3_V, LLAVA)
