"""What stands in the way of a family that kvfold does not know, read off its config.json, and what to do instead."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

Config = dict[str, Any]
INSTEAD = {
    "small": "its cache is small as it is",
    "8 bits": "keep it as it is, and let the engine keep its cache in 8 bits",
    "folder": "give that folder",
}


def _has(*keys: str) -> Callable[[Config], bool]:
    """Whether one of these keys is there and neither null, zero, false nor empty."""
    return lambda said: any(said.get(key) for key in keys)


def _is(*kinds: str) -> Callable[[Config], bool]:
    return lambda said: said.get("model_type") in kinds


def _has_alibi(said: Config) -> bool:
    described = said.get("attn_config")
    return bool(said.get("alibi") or (isinstance(described, dict) and described.get("alibi"))) or _is("bloom", "mpt")(said)


def _varies(said: Config) -> bool:
    own = ("swa_head_dim", "swa_num_key_value_heads", "global_head_dim", "num_global_key_value_heads", "block_configs")
    return _has(*own)(said)


def _scales_by_position(said: Config) -> bool:
    rope = said.get("rope_parameters")
    return isinstance(rope, dict) and bool(rope.get("llama_4_scaling_beta"))


_OBSTACLES: tuple[tuple[Callable[[Config], bool], str, str], ...] = (
    (_has("kv_lora_rank"), "its attention is MLA already", "small"),
    (_has("compress_ratios"), "its attention keeps one key for many tokens already", "small"),
    (_has_alibi, "its positions are ALiBi's, not a RoPE's", "8 bits"),
    (_is("gpt2", "opt", "gpt_bigcode"), "its positions are learned ones, not a RoPE's", "8 bits"),
    (_has("mamba_num_heads", "ssm_state_size"), "some of its layers are state-space ones and keep no keys", "small"),
    (_has("linear_num_key_heads", "linear_attn_config"), "some of its layers are linear attention and keep no keys", "small"),
    (_has("attention_chunk_size"), "some of its layers attend in chunks", "8 bits"),
    (_has("cross_attention_layers"), "some of its layers attend to an image", "8 bits"),
    (_has("blocksparse_block_size", "sparse_config", "index_topk"), "its attention leaves out most keys", "8 bits"),
    (
        _is("hunyuan_v1_moe"),
        "norms stand behind the RoPE of its queries and keys, so that scores depend on more than the distance of positions",
        "8 bits",
    ),
    (_varies, "its layers have different geometry", "8 bits"),
    (_has("llm_cfg"), "its language model lies in a folder of its own, llm, as a checkpoint of a known family", "folder"),
    (_scales_by_position, "its queries are scaled by their position", "8 bits"),
    (_has("num_kv_shared_layers"), "some of its layers share their keys and values", "8 bits"),
)
"""Whether it is so, what to call it, and what to do instead."""


def obstacles(config: Config) -> list[tuple[str, str]]:
    """What of this model the attention of the known families cannot say, each in a few words, and a key of `INSTEAD`."""
    places = [config, _inner(config)]
    return [(reason, instead) for there, reason, instead in _OBSTACLES if any(map(there, places))]


def _inner(config: Config) -> Config:
    """The config of the language model in a model of several parts."""
    found = next((config[key] for key in ("text_config", "language_config", "llm_config") if config.get(key)), None)
    return found if isinstance(found, dict) else {}


def describe(config: Config, known: Sequence[str]) -> str:
    """The refusal of a family that is not known: what stands in the way, or what the name was perhaps meant to be."""
    model_type = config.get("model_type")
    text = f"model_type {model_type!r:.60} is not a family kvfold knows."
    if inner := _inner(config).get("model_type"):
        text += f" Its language model is of model_type {inner!r:.60}."
    if found := obstacles(config):
        text += f" What stands in the way: {'; '.join(reason for reason, _ in found)}."
        if first := next((instead for _, instead in found if instead), None):
            text += f" Instead: {INSTEAD[first]}."
    elif not _in_transformers(model_type):
        text += " transformers has no class of that name."
        close = difflib.get_close_matches(str(model_type), known, n=1, cutoff=0.7)
        text += f" The nearest is {close[0]}." if close else ""
    if quantised := quantisation(config):
        text += f" Its weights are quantised too ({quantised})."
    return f"{text} `kvfold families` lists those that it knows; CONTRIBUTING.md shows how to add one"


QUANTISED = ("quantization_config", "compression_config")


def quantisation(config: Config) -> str:
    """How a config.json says that weights are quantised: the method, or the key that says so; empty where it does not."""
    key = next((key for key in QUANTISED if config.get(key) is not None), "")
    found = config.get(key)
    return str(found.get("quant_method") or key) if isinstance(found, dict) else key


def unquantised(config: Config) -> str:
    """What the checkpoint before its quantisation is called, as far as config.json tells."""
    name = config.get("_name_or_path")
    endings = ("-FP8", "-FP8-dynamic", "-fp8", "-AWQ", "-GPTQ", "-GPTQ-Int4", "-GPTQ-Int8", "-bnb-4bit", "-w4a16", "-w8a8")
    ending = next((e for e in sorted(endings, key=len, reverse=True) if isinstance(name, str) and name.endswith(e)), None)
    return str(name).removesuffix(ending) if ending else ""


def _in_transformers(model_type: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING
