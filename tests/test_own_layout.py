"""The kvfold layout: exact at full width for every family, and a real model of transformers with a small cache."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

from kvfold.convert import folding
from kvfold.convert.layouts import step3_text
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.model import load_causal
from kvfold.errors import UserError
from kvfold.evaluation.layers import measure_cache
from kvfold.recipes.model import open_folded
from kvfold.surgery import latent
from kvfold.surgery.designs import design
from kvfold.surgery.kvfold_attention import attention_of, exchange, rotate
from tests.helpers import FAMILIES, LLAMA3_ROPE, MIXED, OTHERS, SIMILAR, invoke, save_model, save_tokens
from tests.test_convert import IDS, decoded_as_uncached, fold, load, logits

SLIDING = ("mistral", {"sliding_window": 12})
SOURCES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    SLIDING,
    ("llama", {"attention_bias": True, "num_key_value_heads": 2, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    ("qwen3", {"num_key_value_heads": 4, "attention_bias": True}),
    *((family, {"num_key_value_heads": 4}) for family in OTHERS),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    ("gpt_oss", {"num_key_value_heads": 4}),
]
NORMED = ("hunyuan_v1_dense", "qwen3", "olmo2", "qwen3_moe", "gemma3_text", "olmo3", "exaone4")
GROUPED_NORMED: list[tuple[str, dict[str, Any]]] = [("qwen3", {"num_key_value_heads": 4})]
TABLES: list[tuple[str, dict[str, Any]]] = [("cohere", {}), ("gemma3_text", {})]
"""Families whose tables of angles are made in another way."""
BEHIND: list[tuple[str, dict[str, Any]]] = [("hunyuan_v1_dense", {"num_key_value_heads": 4})]
"""Families whose scores depend on more of two positions than their distance."""
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
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    keys = config.get("num_key_value_heads", heads) * config.get("head_dim", hidden // heads)
    rank = min(hidden, 2 * keys)
    return {
        "mla": {"to": "mla", "kv_rank": rank, "rope_dim": keys, "layout": "kvfold"},
        "mla, low-rank queries": {"to": "mla", "kv_rank": rank, "rope_dim": keys, "q_rank": hidden},
        "mla, rebuilt keys": {"to": "mla", "kv_rank": rank, "keys": "rebuilt"},
        "mfa": {"to": "mfa", "width": keys},
        "mfa-kr": {"to": "mfa-kr", "width": 2 * keys},
    }


def possible(sources: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any], str]]:
    """With every design; queries behind a norm cannot be of low rank."""
    pairs = [(*source, design) for source in sources for design in SMALL]
    return [(family, *rest) for family, *rest in pairs if family not in NORMED or rest[-1] != "mla, low-rank queries"]


CENTRED: dict[str, Any] = {"num_key_value_heads": 4, "use_qk_norm": True, "attention_bias": True}
FEW = [
    ("gpt_neox", {}),
    ("cohere", CENTRED),
    *((family, {"num_key_value_heads": 4}) for family in (*SIMILAR, *MIXED) if family != "gpt_oss"),
]


@pytest.mark.parametrize(
    ("family", "changes", "design"),
    [
        *possible(SOURCES),
        *((*source, design) for source in FEW for design in ("mla", "mfa-kr")),
        ("cohere", CENTRED, "mla, rebuilt keys"),
    ],
    ids=str,
)
def test_full_width_is_the_source(family: str, changes: dict[str, Any], design: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", family, **changes)
    tokens = save_tokens(tmp_path / "t.safetensors", 16, min(40, changes.get("sliding_window") or 40))
    fold(source, tmp_path / "out", **whole(source)[design], calibrate=tokens)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("design", ["mla", "mla, rebuilt keys", "mfa-kr"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2"])
def test_layers_with_a_window_can_be_folded_too(family: str, design: str, tmp_path: Path) -> None:
    """On text longer than their window, with the RoPE of their kind; decoding drops what they do not see."""
    source = save_model(tmp_path / "source", family, num_key_value_heads=4)
    tokens = save_tokens(tmp_path / "t.safetensors", 16, 40)
    record = fold(source, tmp_path / "out", **whole(source)[design], layers="all", calibrate=tokens)
    assert len(record["layers"]) == 3 and "folded_layers" not in record["target"]
    model = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(source), atol=1e-4, rtol=1e-4)
    cache = decoded_as_uncached(model)
    assert [layer.keys.shape[2] for layer in cache.layers] == [11, 11, 40]


def test_layers_that_stay_keep_their_tensors_and_their_cache(tmp_path: Path) -> None:
    """Only the last of three is folded, healed with the first window of layers, and counted with the others."""
    source = save_model(tmp_path / "source", "gemma3_text", num_key_value_heads=4)
    tokens = save_tokens(tmp_path / "t.safetensors", 128, 40)
    record = fold(
        source, tmp_path / "out", **SMALL["mla"], calibrate=tokens, heal_steps=20, heal_batch_tokens=320, heal_lr=0.003
    )
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "out")
    for name in before.entries:
        if "layers.2.self_attn" not in name:
            assert torch.equal(after.tensor(name), before.tensor(name)), name
    assert [layer is None for layer in after.config["folded_layers"]] == [True, True, False]
    assert record["target"]["folded_layers"] == [2]
    assert record["layers"][0]["window_error"]["after"] < record["layers"][0]["window_error"]["before"]
    numbers = (64 + 64 + 20 + 12 + 4) / 3  # of the folded layer a latent, a rotary key and the sizes of four keys
    assert record["cache_numbers_per_token_per_layer"] == pytest.approx(numbers)
    model = load(tmp_path / "out")
    assert measure_cache(model, IDS[:1, :4], 4)[0] == pytest.approx(numbers)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tmp_path / "out"), atol=0, rtol=0)


SLOWED = {**LLAMA3_ROPE, "original_max_position_embeddings": 1024}
"""Leaves the first two of four frequencies as they are."""


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, {"rope_parameters": SLOWED}], ids=str
)
def test_the_same_factors_in_both_layouts_agree(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent, "FREE_START", latent.START)
    monkeypatch.setattr(latent, "FREE", latent.STOCK)
    monkeypatch.setattr(folding, "REFITTED", ())  # ours may have a bias, which the regression uses
    source = save_model(tmp_path / "source", "llama", **changes)
    shape = {"to": "mla", "kv_rank": 24, "rope_dim": 4, "calibrate": save_tokens(tmp_path / "t.safetensors", 8, 40)}
    for layout in ("deepseek_v3", "kvfold"):
        fold(source, tmp_path / layout, **shape, layout=layout, turned_keys=0 if layout == "kvfold" else None)
    ours, stock = logits(tmp_path / "kvfold"), logits(tmp_path / "deepseek_v3")
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    assert (ours - logits(source)).abs().max() > 1e-2, "the fold is lossy, or this compares nothing"


@torch.no_grad()
def step3_attention(tensors: list[Tensor], x: Tensor, heads: int, theta: float, eps: float) -> Tensor:
    """Step3's attention as vLLM computes it, from a layer's tensors: x (T, d) → (T, d)."""
    q_a, norm, wq, key, value, o = tensors
    width, tokens = len(key), len(x)
    low = x @ q_a.T
    q = (low * (low.square().mean(-1, keepdim=True) + eps).rsqrt() * norm) @ wq.T
    angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    rope = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    q, k = rotate(q.view(tokens, heads, width).transpose(0, 1), rope), rotate((x @ key.T)[None], rope)[0]
    scores = (q @ k.T * width**-0.5).masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ (x @ value.T)).transpose(0, 1).flatten(1) @ o.T


@pytest.mark.parametrize(("pad_for", "q_rank"), [("none", None), (None, 40)])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}])
def test_step3_text_says_what_mfa_says(
    changes: dict[str, Any], pad_for: str | None, q_rank: int | None, tmp_path: Path
) -> None:
    """The written tensors through Step3's formula, norm and all, against the factors that were lifted from them."""
    source = save_model(tmp_path / "source", "llama", **changes)
    shape = {"to": "mfa", "width": 6, "layout": "step3_text", "pad_for": pad_for, "q_rank": q_rank}
    record = fold(source, tmp_path / "out", **shape, calibrate=save_tokens(tmp_path / "t.safetensors", 8, 40))
    reader = CheckpointReader(tmp_path / "out")
    plan = make_plan(CheckpointReader(source).config, ConvertSettings(**shape))
    config, width = reader.config, 6 if pad_for == "none" else 32
    assert (config["model_type"], config["head_dim"], plan.cache_numbers) == ("step3_text", width, 2 * width)
    assert record["layers"][0]["choice"].endswith("first slots")
    assert sum(reader.tensor(name).numel() for name in reader.entries) == load(source).num_parameters() - plan.parameters_saved
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    rope = load(source).model.rotary_emb(x, torch.arange(40)[None])
    for layer in range(2):
        tensors = {name: reader.tensor(name) for name in step3_text.names(layer, plan)}
        wanted = design(step3_text.lift(tensors, plan))(x[None], rope)[0][0].detach()
        got = step3_attention(list(tensors.values()), x, 8, config["rope_parameters"]["rope_theta"], config["rms_norm_eps"])
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reader.tensor("lm_head.weight"), load(source).lm_head.weight.detach(), atol=0, rtol=0)
    code, message = invoke("evaluate", tmp_path / "out", "--on", f"{tmp_path}/t.safetensors:calibration")
    assert code == 2 and "measure the same fold with --layout kvfold" in message


def test_one_key_head_comes_out_exact_in_step3_text(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama3", num_key_value_heads=1)
    tokens = save_tokens(tmp_path / "t.safetensors", 16, 40)
    shape = {"to": "mfa", "width": 8, "layout": "step3_text"}
    fold(source, tmp_path / "out", **shape, calibrate=tokens)
    reader, model = CheckpointReader(tmp_path / "out"), load(source)
    plan = make_plan(CheckpointReader(source).config, ConvertSettings(**shape))
    for layer, block in enumerate(model.model.layers):
        lifted = step3_text.lift({name: reader.tensor(name) for name in step3_text.names(layer, plan)}, plan)
        exchange(block, design(lifted))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(source), atol=1e-4, rtol=1e-4)


def folded(tmp_path: Path, design: str, family: str = "qwen2", **changes: Any) -> tuple[Path, Path]:
    source = save_model(tmp_path / "source", family, **changes)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, min(40, changes.get("sliding_window") or 40))
    fold(source, tmp_path / "out", **SMALL[design], calibrate=tokens, heal_steps=2, heal_batch_tokens=80)
    return source, tmp_path / "out"


@pytest.mark.parametrize(("family", "changes", "design"), possible([("qwen2", {}), *GROUPED_NORMED, *TABLES, *BEHIND]), ids=str)
def test_cached_is_uncached_padded_is_unpadded_and_the_cache_is_small(
    family: str, changes: dict[str, Any], design: str, tmp_path: Path
) -> None:
    source, out = folded(tmp_path, design, family, **changes)
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
    numbers = plan.cache_numbers
    assert measure_cache(model, IDS[:1, :4], 4) == pytest.approx((numbers, numbers * 4 * plan.spec.layers))
    assert load(source).num_parameters() - plan.parameters_saved == model.num_parameters()


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_keys_of_the_mean_size_are_cached_without_it(family: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", family, num_key_value_heads=4)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    settings = {**SMALL["mla"], "key_norm": "mean"}
    record = fold(source, tmp_path / "out", **settings, calibrate=tokens, heal_steps=2, heal_batch_tokens=80)
    model, plan = load(tmp_path / "out"), make_plan(CheckpointReader(source).config, ConvertSettings(**settings))
    decoded_as_uncached(model)
    assert plan.cache_numbers == record["cache_numbers_per_token_per_layer"] == 20 + 12
    assert measure_cache(model, IDS[:1, :4], 4)[0] == 20 + 12
    assert load(source).num_parameters() - plan.parameters_saved == model.num_parameters()
    assert not [name for name in CheckpointReader(tmp_path / "out").entries if "sizing" in name]
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tmp_path / "out"), atol=0, rtol=0)


def test_mfa_kr_caches_its_key_before_the_rotation(tmp_path: Path) -> None:
    _, out = folded(tmp_path, "mfa-kr")
    model = load(out)
    layer = model.model.layers[0]
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        key = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(IDS)))
    torch.testing.assert_close(cache.layers[0].keys[:, 0], key)
    assert cache.layers[0].values.numel() == 0


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


@pytest.mark.parametrize(
    ("family", "design"), [*(("qwen2", design) for design in SMALL), ("qwen3_moe", "mla"), ("gpt_neox", "mfa-kr")]
)
def test_saved_again_and_trained_with_checkpointing(family: str, design: str, tmp_path: Path) -> None:
    _, out = folded(tmp_path, design, family)
    model = load(out)
    model.save_pretrained(tmp_path / "again")
    assert CheckpointReader(tmp_path / "again").entries.keys() == CheckpointReader(out).entries.keys()
    torch.testing.assert_close(logits(tmp_path / "again"), logits(out), atol=0, rtol=0)
    gradients: list[Tensor] = []
    for checkpointing in (False, True):
        trained = load(out).train()
        if checkpointing:
            # its name before transformers 5.22
            getattr(trained, "activation_checkpointing_enable", trained.gradient_checkpointing_enable)()
        trained(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in trained.parameters())
        gradients.append(attention_of(trained.base_model.layers[0]).o_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


ADAPTERS: dict[str, Callable[[list[str]], PeftConfig]] = {
    "lora": lambda names: LoraConfig(r=2, target_modules=names, init_lora_weights=False),
    "dora": lambda names: LoraConfig(r=2, target_modules=names, init_lora_weights=False, use_dora=True),
    "ia3": lambda names: IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False),
    "loha": lambda names: LoHaConfig(r=2, target_modules=names, init_weights=False),
}


@pytest.mark.parametrize("design", SMALL)
def test_adapters_of_peft_and_offloading_reach_every_projection(design: str, tmp_path: Path) -> None:
    """Absorbed decoding multiplies matrices without calling their modules: what wraps these must count there too."""
    _, out = folded(tmp_path, design)
    for kind, adapter in ADAPTERS.items():
        model: Any = load(out)
        targets = [n for n, module in model.named_modules() if "self_attn" in n and isinstance(module, torch.nn.Linear)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks the model by a name that transformers has given up
            adapted: Any = get_peft_model(model, adapter(targets)).eval()
        for name, parameter in adapted.named_parameters():
            if "ia3" in name:
                parameter.data.uniform_(0.5, 1.5)
        decoded_as_uncached(adapted)
        with torch.no_grad():
            wanted = adapted(IDS).logits
            torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        assert (wanted - logits(out)).abs().max() > 1e-2, kind
    offloaded = cpu_offload(load(out), execution_device=torch.device("cpu"))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(offloaded.generate(IDS, **options), load(out).generate(IDS, **options))


def test_dtypes_and_eager_attention(tmp_path: Path) -> None:
    _, out = folded(tmp_path, "mfa-kr")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    assert model.model.layers[0].self_attn.rope_pairs.dtype == torch.int64
    assert model.generate(IDS, max_new_tokens=3, pad_token_id=0).shape == (2, IDS.shape[1] + 3)
    eager = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(eager(IDS).logits, logits(out), atol=1e-5, rtol=1e-4)
    decoded_as_uncached(eager)


def in_layer(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["folded_layers"][1].update(changes)


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "cap": (in_layer(cap="30"), "folded_layers[1].cap is '30', and has to be a number that is not negative"),
    "no cap": (in_layer(cap=0), "folded_layers[1].cap is 0, which nothing is divided by"),
    "a cap without end": (in_layer(cap=float("inf")), "folded_layers[1].cap is inf, and has to be a number"),
    "rank": (in_layer(rank=20.5), "folded_layers[1].rank is 20.5, and has to be a width"),
    "a rank that fills the memory": (in_layer(q_rank=10**9), "folded_layers[1].q_rank is 1000000000, and has to be a width"),
    "no rank": (lambda c: c["folded_layers"][1].pop("rank"), "folded_layers[1].rank is missing"),
    "query_bias": (in_layer(query_bias=1), "folded_layers[1].query_bias is 1, and has to be true or false"),
    "sinks": (in_layer(sinks="yes"), "folded_layers[1].sinks is 'yes', and has to be true or false"),
    "design": (in_layer(design="evil"), "folded_layers[1].design is 'evil', and there are latent, reused-key, rebuilt-key"),
    "another design": (in_layer(design="reused-key"), "folded_layers[1].nope_dim is nothing that reused-key takes"),
    "positions": (in_layer(positions="evil"), "folded_layers[1].positions is 'evil', and there are halves, pairs, once, none"),
    "norm": (in_layer(norm=5), "folded_layers[1].norm is 5, and has to be an object in braces"),
    "eps": (in_layer(norm={"kv_heads": 8, "together": True, "eps": "x"}), "folded_layers[1].norm.eps is 'x', and has to be a"),
    "together": (in_layer(norm={"kv_heads": 8, "eps": 1e-6}), "folded_layers[1].norm.together is None, and has to be true"),
    "key heads": (
        in_layer(norm={"kv_heads": 3, "together": True, "eps": 0.0}),
        "folded_layers[1].heads is 8, which its kv_heads do not divide",
    ),
    "an odd width": (in_layer(rope_dim=11), "folded_layers[1].rope_dim is 11, an odd width"),
    "what nobody knows": (in_layer(forward=5), "folded_layers[1].forward is nothing that latent takes"),
    "a list": (lambda c: c.update(folded_layers=[[], None]), "folded_layers[0].design is None"),
    "text": (lambda c: c.update(folded_layers="x"), "folded_layers is no list of 2 layers"),
    "too few": (lambda c: c["folded_layers"].pop(), "folded_layers is no list of 2 layers"),
    "source": (lambda c: c.update(source_model_type=["llama"]), "source_model_type is ['llama'], which is no language model"),
    "itself": (lambda c: c.update(source_model_type="kvfold"), "source_model_type is 'kvfold', which is no language model"),
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fold in our own layout, and its source."""
    source, out = folded(tmp_path_factory.mktemp("own"), "mla", "llama")
    return out, source


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_config_is_refused_by_its_field(case: str, own: tuple[Path, Path], tmp_path: Path) -> None:
    damage, words = DAMAGED[case]
    out = shutil.copytree(own[0], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    damage(config)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(words)):  # as whoever loads it without kvfold's verbs
        AutoModelForCausalLM.from_pretrained(out)
    for read in (load_causal, lambda folder: open_folded(folder, None)):
        with pytest.raises(UserError, match=re.escape(f"{out / 'config.json'} is damaged ({words}")) as refused:
            read(out)
        assert "convert the source again" in str(refused.value)


def test_what_no_config_says_is_refused_too(own: tuple[Path, Path], tmp_path: Path) -> None:
    """Another attention than was folded, where the tensors fit, and frequencies that the source has not."""
    out, source = shutil.copytree(own[0], tmp_path / "out"), own[1]
    config = json.loads((out / "config.json").read_text())
    in_layer(cap=5.0)(config)
    (out / "config.json").write_text(json.dumps(config))
    code, text = invoke("uptrain", out, tmp_path / "healed", "--data", source.parent / "t.safetensors")
    assert code == 2 and "config.json has another attention in layer 1 than was folded: convert the source again" in text

    shutil.copy(own[0] / "config.json", out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.self_attn.rope_pairs"][0] = 5
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    wanted = "rope_pairs counts frequencies beyond the 4 of the source: convert it again"
    code, text = invoke("evaluate", out, "--against", source, "--on", f"{source.parent}/t.safetensors:calibration")
    assert code == 2 and wanted in text, text
    with pytest.raises(UserError, match=wanted):
        open_folded(out, None).attention(1, False)


@pytest.mark.parametrize(
    ("family", "design"), [("qwen2", "mla"), ("qwen2", "mfa-kr"), ("qwen3_moe", "mla"), ("gpt_neox", "mla")]
)
def test_loads_where_kvfold_is_not_installed(family: str, design: str, tmp_path: Path) -> None:
    _, out = folded(tmp_path, design, family)
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
    assert (tmp_path / "again" / "kvfold_attention.py").exists()
