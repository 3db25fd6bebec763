"""A folded `deepseek_v3` checkpoint as one GGUF file, which llama.cpp runs as its architecture `deepseek2`.

llama.cpp's own converter leaves out the query rank of a checkpoint that has none, and its loader then refuses the file. It
reads the latent's up-projection as two matrices and caches one key head, the latent with the rotary key. Other folds than MLA
need nothing of this: their architecture is the source's, and `convert_hf_to_gguf.py` knows it.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from kvfold.convert.conversion import Report
from kvfold.convert.output.files import sync
from kvfold.convert.output.partial import alone
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.config import ConfigFile
from kvfold.convert.source.jsonfile import checked, read_json
from kvfold.convert.source.model import build_on_meta
from kvfold.convert.source.opening import refuse_mismatch
from kvfold.errors import UserError

RENAMED = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
RENAMED_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WORDS, _REST = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PRE_TOKENIZERS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""How text is cut before merging: the expression in tokenizer.json → llama.cpp's name for it (llama-vocab.cpp)."""
UNREACHABLE = -1e9
"""The score of a token that no merge makes."""


def write_gguf(
    folder: Path,
    out: Path,
    pre: str | None = None,
    overwrite: bool = False,
    report: Report = lambda share, line: None,
) -> None:
    """Write the checkpoint in `folder` to the file `out`, matrices in their own dtype, norms in float32.

    Args:
        pre: llama.cpp's name for the pre-tokenizer; None takes it from tokenizer.json.

    Raises:
        UserError: `folder` is no deepseek_v3 checkpoint of float32 or bfloat16, its tokenizer is none that GGUF can say, `out`
            exists, or the package `gguf` is missing.
    """
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out} exists: choose another name, or pass --overwrite to replace a file")
    try:
        import numpy
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType
    except ImportError:
        raise UserError("writing GGUF needs the package gguf: pip install 'kvfold[gguf]'") from None
    reader = CheckpointReader(folder)
    config = _checked_config(reader)
    vocabulary = read_vocabulary(folder, config["vocab_size"], pre)
    partial = out.with_name(f".{out.name}.kvfold")
    writer = GGUFWriter(partial, MODEL_ARCH_NAMES[MODEL_ARCH.DEEPSEEK2])
    half = reader.entry("model.embed_tokens.weight").dtype == torch.bfloat16
    writer.add_file_type(LlamaFileType.MOSTLY_BF16 if half else LlamaFileType.ALL_F32)
    writer.add_name(folder.resolve().name)
    _add_geometry(writer, config)
    _add_vocabulary(writer, vocabulary, folder, config["vocab_size"])
    for name, tensor in _tensors(reader, config, meta=True):
        stored = stored_dtype(tensor)
        raw = {torch.float32: GGMLQuantizationType.F32, torch.bfloat16: GGMLQuantizationType.BF16}.get(stored)
        if raw is None:
            raise UserError(f"{folder} has {name} in {stored}: fold it with --dtype float32 or bfloat16")
        writer.add_tensor_info(name, tensor.shape, numpy.dtype("float32"), tensor.numel() * stored.itemsize, raw)
    with alone(partial):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = len(reader.entries)
        for done, (_, tensor) in enumerate(_tensors(reader, config, meta=False)):
            report(min(1.0, done / total), "writing tensors")
            written = tensor.to(stored_dtype(tensor)).contiguous()
            writer.write_tensor_data((written.view(torch.int16) if written.dtype == torch.bfloat16 else written).numpy())
        writer.close()
        sync(partial)
        partial.replace(out)


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """llama.cpp adds and multiplies vectors in float32; matrices keep their dtype."""
    return torch.float32 if tensor.ndim == 1 else tensor.dtype


class _DeepseekConfig(ConfigFile):
    """What is read of a folded config.json."""

    kv_lora_rank: int
    q_lora_rank: None = None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    rms_norm_eps: float
    intermediate_size: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any]


class _Added(BaseModel):
    id: int
    content: str
    special: bool = False


class _Bpe(BaseModel):
    """The model of a byte-pair tokenizer; early files do not state its type."""

    type: str = "BPE"
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]
    byte_fallback: bool | None = False
    unk_token: str | None = None


class _Tokenizer(BaseModel):
    model: _Bpe
    added_tokens: list[_Added] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


def _checked_config(reader: CheckpointReader) -> dict[str, Any]:
    """The config of a checkpoint that can be written, whose tensors are those that it means. Raises UserError otherwise."""
    folder, config = reader.folder, reader.config
    kind = config.get("model_type")
    if kind == "kvfold":
        raise UserError(f"{folder} is in the kvfold layout, which llama.cpp does not know: fold with --layout deepseek_v3")
    if kind != "deepseek_v3":
        raise UserError(f"{folder} is a {kind} checkpoint: llama.cpp's own convert_hf_to_gguf.py writes that")
    theirs = f"{folder} was not folded by kvfold: llama.cpp's own convert_hf_to_gguf.py writes it"
    if config.get("q_lora_rank") is not None:
        raise UserError(theirs)
    said = checked(_DeepseekConfig, config, str(folder / "config.json"), "fold it again")
    if said.first_k_dense_replace < said.num_hidden_layers:
        raise UserError(theirs)
    if not isinstance(said.rope_parameters.get("rope_theta"), (int, float)):
        raise UserError(f"{folder / 'config.json'} is damaged (rope_parameters names no rope_theta): fold it again")
    refuse_mismatch(reader, build_on_meta(config))
    return config


def _add_geometry(writer: Any, config: dict[str, Any]) -> None:
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # absorbed, all heads read one key of latent and rotary part
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(rank)
    writer.add_leading_dense_block_count(config["num_hidden_layers"])
    writer.add_expert_shared_count(0)  # asked for by the loader, read by no dense layer
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _tensors(reader: CheckpointReader, config: dict[str, Any], meta: bool) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and tensors, one after the other; with `meta` shapes and dtypes without numbers."""
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    for name, renamed in RENAMED.items():
        yield renamed, reader.tensor(name, meta=meta)
    for layer in range(config["num_hidden_layers"]):
        for name, renamed in RENAMED_IN_LAYER.items():
            yield f"blk.{layer}.{renamed}.weight", reader.tensor(f"model.layers.{layer}.{name}.weight", meta=meta)
        up = reader.tensor(f"model.layers.{layer}.self_attn.kv_b_proj.weight", meta=meta)  # (H·(N + D), r)
        up_k, up_v = up.unflatten(0, (-1, nope + value)).split([nope, value], 1)
        yield f"blk.{layer}.attn_k_b.weight", up_k.mT  # (H, r, N): the query is multiplied by it
        yield f"blk.{layer}.attn_v_b.weight", up_v


def read_vocabulary(folder: Path, size: int, pre: str | None) -> dict[str, Any]:
    """The tokenizer as GGUF says it: `model` ("llama" or "gpt2"), `pre`, `tokens`, `types`, and `scores` or none.

    Raises:
        UserError: there is no tokenizer.json, or it is of a kind that llama.cpp has no words for.
    """
    from gguf import TokenType

    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(
            f"{folder} has no tokenizer.json, which GGUF needs: copy the source's, or save its fast tokenizer there"
        )
    raw = read_json(file)
    kind = raw["model"].get("type", "BPE") if isinstance(raw.get("model"), dict) else "BPE"
    if kind != "BPE":
        raise UserError(f"{file} is a {kind!s:.40} tokenizer: kvfold writes BPE ones to GGUF")
    tokenizer = checked(_Tokenizer, raw, str(file), "copy the source's")
    model = tokenizer.model
    tokens, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    for token, number in [*model.vocab.items(), *((added.content, added.id) for added in tokenizer.added_tokens)]:
        if not 0 <= number < size:
            raise UserError(
                f"{file} gives {token!r:.60} the id {number}, outside the model's vocabulary of {size}: copy the source's"
            )
    if len(set(model.vocab.values())) < len(model.vocab):
        raise UserError(f"{file} gives one id to several tokens: copy the source's")
    for token, number in model.vocab.items():
        is_byte = model.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[number], types[number] = token, TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in tokenizer.added_tokens:
        special = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        tokens[added.id] = added.content
        types[added.id] = TokenType.UNKNOWN if added.content == model.unk_token else special
    if not model.byte_fallback:
        return {"model": "gpt2", "pre": pre or _pre_tokenizer(file, raw), "tokens": tokens, "types": types}
    # llama.cpp joins the neighbours of the best score; here the first merge in the list is the best.
    scores = dict.fromkeys(tokens, UNREACHABLE)
    for rank, pair in enumerate(model.merges):
        merged = "".join(pair.split(" ") if isinstance(pair, str) else pair)
        scores[merged] = max(scores.get(merged, UNREACHABLE), -float(rank))
    begins = json.dumps([tokenizer.normalizer, tokenizer.pre_tokenizer])
    prefix = '"Prepend"' in begins or '"prepend_scheme": "first"' in begins or '"prepend_scheme": "always"' in begins
    described = {"model": "llama", "pre": pre or "default", "tokens": tokens, "types": types}
    return {**described, "scores": [scores[token] for token in tokens], "space_prefix": prefix}


def _pre_tokenizer(file: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text before it merges."""
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers") or [steps]
    steps = [step if isinstance(step, dict) else {} for step in steps] if isinstance(steps, list) else [{}]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    pattern = steps[0].get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) and kinds == ["Split", "ByteLevel"] else None
    found = PRE_TOKENIZERS.get(regex) if isinstance(regex, str) else None
    if found is None:
        raise UserError(f"{file} cuts text in a way kvfold has no name for: give --pre, one of the names in llama-vocab.cpp")
    return found


def _add_vocabulary(writer: Any, vocabulary: dict[str, Any], folder: Path, size: int) -> None:
    from gguf import SpecialVocab

    logging.getLogger("gguf").setLevel(logging.ERROR)  # it would warn of templates for pairs of texts
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
        writer.add_add_space_prefix(vocabulary["space_prefix"])
    try:
        SpecialVocab(folder, load_merges="scores" not in vocabulary, n_vocab=size).add_to_gguf(writer, quiet=True)
    except Exception as error:  # whatever stands in the files that it reads by itself
        raise UserError(f"the tokenizer files of {folder} are none that GGUF can say ({error}): copy the source's") from None
