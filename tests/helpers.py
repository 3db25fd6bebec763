"""Tiny models, tokenizers, token files and two ways to run the command line, for all tests."""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

import kvfold.convert.layouts.modeling_kvfold  # noqa: F401 — registers our layout with transformers
from kvfold.cli import main

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
"""`llama3` is llama with the RoPE scaling of Llama 3.1."""
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
OTHERS = ("olmo2", "gemma", "granite", "starcoder2", "seed_oss", "phi3", "stablelm", *EXPERTS)
"""Families whose layers are not Llama's beside attention, or little known."""
SIMILAR = ("cohere", "glm", "glm4", "ernie4_5", "phi", "phimoe", "hunyuan_v1_dense")
"""More of them, which are tested with two designs: RoPE that turns neighbouring numbers, biases everywhere."""
MIXED = ("gemma2", "gemma3_text", "cohere2", "smollm3", "olmo3", "exaone4", "gpt_oss")
"""Families whose layers are of several kinds: three layers here, of which the last attends over everything."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """8 query and 8 key heads of width 8, hidden 64, 2 layers, vocabulary 128, 128 positions; `changes` on top."""
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    own: dict[str, dict[str, Any]] = {
        "llama3": {"rope_parameters": LLAMA3_ROPE},
        "mistral": {"sliding_window": None},
        "phi3": {"pad_token_id": 0},
        "glm": {"pad_token_id": 0},
        "glm4": {"pad_token_id": 0},
        "gpt_neox": {"num_key_value_heads": 8},
        "mixtral": {"num_local_experts": 4, "sliding_window": None},
        "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
        "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "gemma2": {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
        "gemma3_text": {"query_pre_attn_scalar": 24},
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "pad_token_id": 0},
        "smollm3": {"no_rope_layers": [1, 0, 1], "layer_types": None, "sliding_window": None, "pad_token_id": 0},
        "granite": {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    }
    mixed = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    values |= {**mixed, "sliding_window": 12} if family in MIXED else {}
    kind = "llama" if family == "llama3" else family
    return AutoConfig.for_model(kind, **{**values, **own.get(family, {}), **changes})


def save_model(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Save a random model whose heads attend far from uniformly, so that a wrong fold shows; returns `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inside = "self_attn" in name or ".attention." in name
            if inside and ("_norm" in name or "_layernorm" in name):
                parameter.uniform_(0.3, 3.0)
            elif inside and not name.endswith(("o_proj.weight", "dense.weight")):
                parameter.normal_(std=0.3)  # biases too, which begin at zero
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_tokens(path: Path, rows: int, length: int, vocab: int = 128, name: str = "calibration", seed: int = 0) -> str:
    """Write random int16 token rows and return what --calibrate and --on take: `path:name`."""
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    save_file({name: ids}, path)
    return f"{path}:{name}"


def save_tokenizer(folder: Path, merges: list[tuple[str, str]] | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: 256 bytes, `merges`, <s> and </s>; `bos` puts <s> before every text."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges or []), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokens.index("<s>"))])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    saved.save_pretrained(folder)
    return saved


def run_cli(*args: Any, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m kvfold *args` as a process of its own: seconds for importing torch, so only where that matters."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "kvfold", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


def invoke(*args: Any) -> tuple[int, str]:
    """The same in this process: exit code, and standard output when it is 0, standard error otherwise.

    An exception that escapes gives 1 and its traceback, as the interpreter would.
    """
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = ["kvfold", *map(str, args)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except Exception:
            code = 1
            traceback.print_exc(limit=-3, file=err)
    return code, (err if code else out).getvalue()
