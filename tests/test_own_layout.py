"""The kvfold layout: exact at full width for every family, and a real model of transformers with a small cache."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from kvfold.convert.checkpoint import CheckpointReader
from kvfold.convert.plan import make_plan
from kvfold.convert.settings import ConvertSettings
from kvfold.evaluation.layers import measure_cache
from kvfold.surgery import latent
from tests.helpers import FAMILIES, save_model, save_tokens
from tests.test_convert import IDS, decoded_as_uncached, fold, load, logits

SLIDING = ("mistral", {"sliding_window": 12})
SOURCES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    SLIDING,
    ("llama", {"attention_bias": True, "num_key_value_heads": 2, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
]
SMALL: dict[str, dict[str, Any]] = {
    "mla": {"to": "mla", "kv_rank": 20, "rope_dim": 12, "layout": "kvfold"},
    "mla, low-rank queries": {"to": "mla", "kv_rank": 20, "rope_dim": 6, "q_rank": 24},
    "mla, rebuilt keys": {"to": "mla", "kv_rank": 20, "keys": "rebuilt"},
    "mfa": {"to": "mfa", "width": 14},
    "mfa-kr": {"to": "mfa-kr", "width": 20},
}


def whole(source: Path) -> dict[str, dict[str, Any]]:
    """Every design at the width at which nothing is lost."""
    config = CheckpointReader(source).config
    keys, hidden = config["num_key_value_heads"] * config["head_dim"], config["hidden_size"]
    rank = min(hidden, 2 * keys)
    return {
        "mla": {"to": "mla", "kv_rank": rank, "rope_dim": keys, "layout": "kvfold"},
        "mla, low-rank queries": {"to": "mla", "kv_rank": rank, "rope_dim": keys, "q_rank": hidden},
        "mla, rebuilt keys": {"to": "mla", "kv_rank": rank, "keys": "rebuilt"},
        "mfa": {"to": "mfa", "width": keys},
        "mfa-kr": {"to": "mfa-kr", "width": 2 * keys},
    }


@pytest.mark.parametrize("design", SMALL)
@pytest.mark.parametrize(("family", "changes"), SOURCES, ids=str)
def test_full_width_is_the_source(family: str, changes: dict[str, Any], design: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", family, **changes)
    tokens = save_tokens(tmp_path / "t.safetensors", 16, min(40, changes.get("sliding_window") or 40))
    fold(source, tmp_path / "out", **whole(source)[design], calibrate=tokens)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}])
def test_the_same_factors_in_both_layouts_agree(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent, "FREE", latent.STOCK)
    source = save_model(tmp_path / "source", "llama", **changes)
    shape = {"to": "mla", "kv_rank": 24, "rope_dim": 4, "calibrate": save_tokens(tmp_path / "t.safetensors", 8, 40)}
    for layout in ("deepseek_v3", "kvfold"):
        fold(source, tmp_path / layout, **shape, layout=layout)
    ours, stock = logits(tmp_path / "kvfold"), logits(tmp_path / "deepseek_v3")
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    assert (ours - logits(source)).abs().max() > 1e-2, "the fold is lossy, or this compares nothing"


def folded(tmp_path: Path, design: str, family: str = "qwen2", **changes: Any) -> tuple[Path, Path]:
    source = save_model(tmp_path / "source", family, **changes)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, min(40, changes.get("sliding_window") or 40))
    fold(source, tmp_path / "out", **SMALL[design], calibrate=tokens, heal_steps=2, heal_batch_tokens=80)
    return source, tmp_path / "out"


@pytest.mark.parametrize("design", SMALL)
def test_cached_is_uncached_padded_is_unpadded_and_the_cache_is_small(design: str, tmp_path: Path) -> None:
    source, out = folded(tmp_path, design)
    model = load(out)
    decoded_as_uncached(model)
    short, long = IDS[:1, 5:20], IDS[1:, :20]
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)
    assert together[0, 20:].tolist() == model.generate(short, **options)[0, 15:].tolist()
    assert together[1, 20:].tolist() == model.generate(long, **options)[0, 20:].tolist()
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        torch.testing.assert_close(
            model(padded, attention_mask=mask, position_ids=positions).logits[0, 5:],
            model(short).logits[0],
            atol=1e-5,
            rtol=1e-4,
        )
    plan = make_plan(CheckpointReader(source).config, ConvertSettings(**SMALL[design]))
    assert measure_cache(model, IDS[:1, :10]) == (plan.cache_numbers, plan.cache_numbers * 4 * 2)
    assert load(source).num_parameters() - plan.parameters_saved == model.num_parameters()


@pytest.mark.parametrize("design", SMALL)
def test_static_cache_beams_and_several_tokens_at_a_time(design: str, tmp_path: Path) -> None:
    _, out = folded(tmp_path, design)
    model = load(out)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = IDS[:, :12]
    dynamic = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", disable_compile=True, **options), dynamic)
    assert model.generate(prompt, num_beams=3, **options).shape == dynamic.shape
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in IDS[:, :18].split(6, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(IDS[:, :18]).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("design", SMALL)
def test_a_sliding_window_holds_while_decoding(design: str, tmp_path: Path) -> None:
    _, out = folded(tmp_path, design, *SLIDING[:1], **SLIDING[1])
    cache = decoded_as_uncached(load(out))
    assert cache.layers[0].keys.shape[2] == 11  # the window less the token that is being read


@pytest.mark.parametrize("design", SMALL)
def test_saved_again_and_trained_with_checkpointing(design: str, tmp_path: Path) -> None:
    _, out = folded(tmp_path, design)
    model = load(out)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(out), atol=0, rtol=0)
    gradients: list[Tensor] = []
    for checkpointing in (False, True):
        trained = load(out).train()
        if checkpointing:
            # its name before transformers 5.22
            getattr(trained, "activation_checkpointing_enable", trained.gradient_checkpointing_enable)()
        trained(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in trained.parameters())
        gradients.append(trained.model.layers[0].self_attn.o_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_dtypes_and_eager_attention(tmp_path: Path) -> None:
    _, out = folded(tmp_path, "mfa-kr")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    assert model.model.layers[0].self_attn.rope_pairs.dtype == torch.int64
    assert model.generate(IDS, max_new_tokens=3, pad_token_id=0).shape == (2, IDS.shape[1] + 3)
    eager = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(eager(IDS).logits, logits(out), atol=1e-5, rtol=1e-4)
    decoded_as_uncached(eager)


@pytest.mark.parametrize("design", ["mla", "mfa-kr"])
def test_loads_where_kvfold_is_not_installed(design: str, tmp_path: Path) -> None:
    _, out = folded(tmp_path, design)
    torch.save(logits(out), tmp_path / "wanted.pt")
    code = f"""
import sys
sys.modules["kvfold"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(out)!r})
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("it loaded unasked")
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    ids, wanted = (torch.load({str(tmp_path)!r} + "/" + name) for name in ("ids.pt", "wanted.pt"))
    torch.testing.assert_close(model(ids).logits, wanted)
assert model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3).shape[1] <= 7
model.save_pretrained({str(tmp_path / "again")!r})
"""
    torch.save(IDS, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (tmp_path / "again" / "modeling_kvfold.py").exists()
