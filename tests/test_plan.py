"""What the plan says of real models, checked against their published configs and against transformers."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvfold.convert.families import AttentionSpec, Rope, family_of
from kvfold.convert.planning.engines import LatentShape
from kvfold.convert.planning.parameters import saved_at_least
from kvfold.convert.planning.plan import cache_dtype, make_plan
from kvfold.convert.planning.settings import ConvertSettings, normal_dtype, parse_budget, parse_settings, parse_size, unknown
from kvfold.convert.planning.widths import widths_to_try
from kvfold.convert.source.model import build_on_meta
from kvfold.errors import UserError
from tests.helpers import FAMILIES, invoke, save_model, tiny_config

# As published on the Hub, the keys that decide geometry and size.
LLAMA_2_7B: dict[str, Any] = {  # meta-llama/Llama-2-7b-hf; key heads left out, as the first LLaMA configs do
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_31_8B: dict[str, Any] = {  # meta-llama/Llama-3.1-8B
    "model_type": "llama",
    "attention_bias": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
TINYLLAMA: dict[str, Any] = {  # TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 32000,
}
SMOLLM: dict[str, Any] = {  # HuggingFaceTB/SmolLM-135M
    "model_type": "llama",
    "attention_bias": False,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 49152,
}
MISTRAL: dict[str, Any] = {  # mistralai/Mistral-7B-v0.1
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN: dict[str, Any] = {  # Qwen/Qwen2.5-0.5B
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_PARAMETERS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def count_parameters(config: dict[str, Any]) -> int:
    return build_on_meta(config).num_parameters()


def plain(theta: float) -> Rope:
    return Rope("default", theta, {})


def geometry(hidden: int, layers: int, heads: int, kv_heads: int, width: int, *rest: Any) -> AttentionSpec:
    *biases_and_rope, window, positions, vocabulary, tied, eps = rest
    kinds = (window,) * layers, (True,) * layers
    sizes = hidden, layers, heads, kv_heads, width
    return AttentionSpec(*sizes, *biases_and_rope, *kinds, positions, vocabulary, tied, eps, width)


# hidden, layers, heads, key heads, head width, biases on q k v, on o, RoPE, window, positions, vocabulary
SPECS = [
    (LLAMA_2_7B, geometry(4096, 32, 32, 32, 128, False, False, plain(1e4), None, 4096, 32000, False, 1e-5)),
    (
        LLAMA_31_8B,
        geometry(4096, 32, 32, 8, 128, False, False, Rope("llama3", 5e5, LLAMA3_PARAMETERS), None, 131072, 128256, False, 1e-5),
    ),
    (TINYLLAMA, geometry(2048, 22, 32, 4, 64, False, False, plain(1e4), None, 2048, 32000, False, 1e-5)),
    (SMOLLM, geometry(576, 30, 9, 3, 64, False, False, plain(1e4), None, 2048, 49152, True, 1e-5)),
    (MISTRAL, geometry(4096, 32, 32, 8, 128, False, False, plain(1e4), 4096, 32768, 32000, False, 1e-5)),
    (QWEN, geometry(896, 24, 14, 2, 64, True, False, plain(1e6), None, 32768, 151936, True, 1e-6)),
]
NAMES = ["Llama-2-7B", "Llama-3.1-8B", "TinyLlama-1.1B", "SmolLM-135M", "Mistral-7B-v0.1", "Qwen2.5-0.5B"]


@pytest.mark.parametrize(("config", "spec"), SPECS, ids=NAMES)
def test_spec_of_published_configs(config: dict[str, Any], spec: AttentionSpec) -> None:
    assert family_of(config).model_type == config["model_type"]
    assert family_of(config).spec(config) == spec


@pytest.mark.parametrize(
    ("config", "numbers", "size", "parameters"),
    [  # 2·G·D; 2·G·D·layers at 2 bytes; the parameter counts of the model cards, to the last one
        (LLAMA_2_7B, 8192, 524_288, 6_738_415_616),
        (LLAMA_31_8B, 2048, 131_072, 8_030_261_248),
        (TINYLLAMA, 512, 22_528, 1_100_048_384),
        (SMOLLM, 384, 23_040, 134_515_008),
        (MISTRAL, 2048, 131_072, 7_241_732_096),
        (QWEN, 256, 12_288, 494_032_768),
    ],
    ids=NAMES,
)
def test_cache_and_parameters_of_published_configs(config: dict[str, Any], numbers: int, size: int, parameters: int) -> None:
    plan = make_plan(config, ConvertSettings(to="mqa", dtype="bf16"))
    assert plan.refusals == []
    assert plan.spec.cache_numbers == numbers
    assert plan.cache_bytes(1, 1, "bfloat16") == (size, size // plan.spec.kv_heads)
    assert plan.cache_bytes(1, 1, "float32") == (2 * size, 2 * size // plan.spec.kv_heads)
    assert count_parameters(config) == parameters
    folded = {**config, "num_key_value_heads": 1, "head_dim": plan.spec.head_dim}
    assert parameters - plan.parameters_saved == count_parameters(folded)


def test_sliding_windows_are_read_layer_by_layer() -> None:
    assert family_of(MISTRAL).spec(MISTRAL).windows == (4096,) * 32
    later = {**MISTRAL, "sliding_window": None}  # Mistral-7B-v0.2 and later
    assert family_of(later).spec(later).windows == (None,) * 32
    without = {k: v for k, v in MISTRAL.items() if k != "sliding_window"}  # 4096 is the default of MistralConfig
    assert family_of(without).spec(without).sliding_window == 4096
    windowed = {**QWEN, "use_sliding_window": True, "sliding_window": 8192, "max_window_layers": 20}
    assert family_of(windowed).spec(windowed).windows == (None,) * 20 + (8192,) * 4
    assert family_of(QWEN).spec(QWEN).sliding_window is None


@pytest.mark.parametrize(
    ("written", "rope"),
    [
        ({"rope_theta": 5e5}, plain(5e5)),
        ({}, plain(1e4)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, plain(5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, Rope("linear", 1e4, {"factor": 2.0})),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            Rope("yarn", 1e6, {"factor": 4.0, "original_max_position_embeddings": 2048}),
        ),
    ],
)
def test_rope_as_transformers_4_and_5_write_it(written: dict[str, Any], rope: Rope) -> None:
    config = {**{k: v for k, v in SMOLLM.items() if not k.startswith("rope")}, **written}
    assert family_of(config).spec(config).rope == rope


def test_biases_follow_the_config() -> None:
    config = {**SMOLLM, "attention_bias": True}
    spec = family_of(config).spec(config)
    assert (spec.qkv_bias, spec.o_bias) == (True, True)
    assert set(family_of(config).names(3, spec)) == {"q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias"}
    names = family_of(QWEN).names(3, family_of(QWEN).spec(QWEN))
    assert set(names) == {"q", "k", "v", "o", "q_bias", "k_bias", "v_bias"}
    assert names["k_bias"] == "model.layers.3.self_attn.k_proj.bias"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_saved_are_those_of_the_smaller_model(family: str, biased: bool, kv_heads: int) -> None:
    config = tiny_config(family, **({"attention_bias": True} if biased else {})).to_dict()
    plan = make_plan(config, ConvertSettings(to="gqa", kv_heads=kv_heads))
    assert plan.parameters_saved == count_parameters(config) - count_parameters({**config, "num_key_value_heads": kv_heads})
    # 2 layers, W_K and W_V, (8 - G) heads of width 8, 64 inputs and perhaps a bias
    bias = family == "qwen2" or (biased and family != "mistral")
    assert plan.parameters_saved == 2 * 2 * (8 - kv_heads) * 8 * (64 + bias)


def test_record_and_cache_table(tmp_path: Path) -> None:
    """Llama-3.1-8B to 2 key heads at 25%: the numbers that the table and --json show."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    code, text = invoke("plan", tmp_path, "--to", "gqa", "--kv-budget", "25%", "--batch", 4, "--json", "-")
    assert code == 0
    record = json.loads(text)
    assert record["cache_dtype"] == "bfloat16"
    assert record["kv_budget"] == 0.25
    assert record["cache_numbers_per_token_per_layer"] == {"source": 2048, "target": 512}
    assert record["cache_bytes_per_token"] == {"source": 131_072, "target": 32_768}
    gib = 2**30
    assert record["cache_bytes"] == [
        {"context": 4096, "batch": 4, "source": 2 * gib, "target": gib // 2},
        {"context": 32768, "batch": 4, "source": 16 * gib, "target": 4 * gib},
        {"context": 131072, "batch": 4, "source": 64 * gib, "target": 16 * gib},
    ]
    saved = 32 * 2 * 6 * 128 * 4096  # layers, W_K and W_V, heads, width, inputs
    assert record["source"]["parameters"] == 8_030_261_248
    assert record["target"]["parameters"] == 8_030_261_248 - saved
    assert record["target"]["kv_heads"] == 2
    assert record["target"]["architecture"] == "LlamaForCausalLM"
    assert (record["source"]["kv_heads"], record["source"]["head_dim"]) == (8, 128)
    assert record["source"]["rope"] == {"type": "llama3", "theta": 5e5, "parameters": LLAMA3_PARAMETERS}
    assert record["refusals"] == []


def test_plan_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    code, text = invoke("plan", tmp_path, "--to", "mqa", "--json", tmp_path / "plan.json")
    assert code == 0
    assert json.loads((tmp_path / "plan.json").read_text())["target"]["kv_heads"] == 1
    for name, *cells in (
        ("key/value heads", "8", "1"),
        ("parameters", "8,030,261,248", "7,795,380,224"),
        ("cached bytes / token", "131,072", "16,384"),
        ("cache at 131,072 × 1", "16.00 GiB", "2.00 GiB"),
        ("KV budget", "100%", "12.5%"),
    ):
        line = next(line for line in text.splitlines() if name in line)
        assert [cell in line for cell in cells] == [True, True]


def test_the_cache_stops_growing_at_the_sliding_window(tmp_path: Path) -> None:
    """Mistral 7B v0.1: 4,096 tokens of 131,072 bytes are 0.5 GiB, however long the context."""
    plan = make_plan(MISTRAL, ConvertSettings(to="gqa", kv_budget="50%"))
    for context in (4096, 32768, 131072):
        assert plan.cache_bytes(context, 2, "bfloat16") == (2**30, 2**29)
    mixed = {**QWEN, "use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 18}
    plan = make_plan(mixed, ConvertSettings(to="mqa"))
    assert (plan.spec.sliding_window, plan.spec.full_layers) == (1024, tuple(range(18)))
    assert plan.cache_bytes(4096, 1, "bfloat16")[0] == (18 * 4096 + 6 * 1024) * 256 * 2
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    code, text = invoke("plan", tmp_path, "--to", "mqa")
    assert code == 0
    assert "cache at 131,072 × 1 *" in text and "cache at 32,768 × 1 *" not in text
    assert "* more than the 32,768 positions that the source was made for" in text
    assert re.search(r"sliding window +│ +4,096 tokens │ +32 of 32 layers", text)


def test_our_own_layout_grows_by_a_tenth_by_default() -> None:
    """Every query head reads the whole rotary key, so a wide one makes the model larger."""
    for budget, widths, growth in (("25%", (1810, 238), 0.099), ("50%", (3968, 128), 0.154)):  # no less than one head turns
        plan = make_plan(LLAMA_2_7B, ConvertSettings(to="mla", kv_budget=budget))  # float16, so no deepseek_v3
        assert (plan.layout, plan.kv_rank, plan.rope_dim) == ("kvfold", *widths)
        assert "float16 cannot hold the scaled latents of deepseek_v3, --dtype bfloat16 can" in plan.note
        assert -saved_at_least(plan) / 6_738_415_616 == pytest.approx(growth, abs=1e-3)
        assert ("the model grows by up to" in plan.note) == (growth > 0.1)
        assert all(rope <= widths[1] for _, rope in widths_to_try(plan))
    assert make_plan(LLAMA_2_7B, ConvertSettings(to="mla", kv_rank=1024, rope_dim=1024)).rope_dim == 1024
    note = make_plan(LLAMA_2_7B, ConvertSettings(to="mfa-kr", kv_budget="12.5%")).note
    assert "the model grows by up to 44%, which --q-rank makes less" in note


@pytest.mark.parametrize("to", ["mla", "mfa", "mfa-kr"])
def test_parameters_of_measured_widths_are_a_bound(to: str) -> None:
    config = tiny_config("llama", num_hidden_layers=4).to_dict()
    plan = make_plan(config, ConvertSettings(to=to, kv_budget="25%", layer_budgets="measured", layout="kvfold"))
    tried = [w for w in widths_to_try(plan) if sum(w)]
    total = int(plan.cache_numbers) * 4
    bound = saved_at_least(plan)
    for widths in itertools.combinations_with_replacement(tried, 4):
        if sum(map(sum, widths)) <= total:
            assert replace(plan, widths=widths).parameters_saved >= bound


def test_plan_and_the_converted_checkpoint_agree(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen2")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "weights")
    code, text = invoke("plan", source, "--to", "gqa", "--kv-heads", 2, "--json", "-")  # reads no weights
    assert code == 0
    (tmp_path / "weights").rename(tmp_path / "source" / "model.safetensors")
    assert invoke("convert", source, tmp_path / "out", "--to", "gqa", "--kv-heads", 2)[0] == 0
    folded = json.loads((tmp_path / "out" / "config.json").read_text())
    assert count_parameters(folded) == json.loads(text)["target"]["parameters"]
    assert make_plan(folded, ConvertSettings(to="gqa", kv_heads=2)).kv_budget == 1.0


def test_budgets_in_percent_and_as_a_share_are_the_same() -> None:
    for config, share, kv_heads in ((LLAMA_2_7B, 25, 8), (LLAMA_31_8B, 50, 4), (LLAMA_31_8B, 12.5, 1), (QWEN, 100, 2)):
        one, two = (make_plan(config, ConvertSettings(to="gqa", kv_budget=b)) for b in (f"{share}%", f"{share / 100}"))
        assert one.refusals == two.refusals == []
        assert one.kv_heads == two.kv_heads == kv_heads
        assert one.kv_budget == share / 100
    third = make_plan(SMOLLM, ConvertSettings(to="gqa", kv_budget="33.3%"))
    assert "nearest is --kv-heads 1, a budget of 0.333" in third.refusals[0]


def test_every_whole_percentage_that_divides_is_accepted() -> None:
    """Rounding of the percentage must not refuse a budget that is exact on paper."""
    for kv_heads in range(1, 129):
        config = {**LLAMA_2_7B, "num_attention_heads": kv_heads, "head_dim": 64, "hidden_size": 64 * kv_heads}
        for percent in range(1, 101):
            wanted, rest = divmod(kv_heads * percent, 100)
            if wanted and rest == 0 and kv_heads % wanted == 0:
                plan = make_plan(config, ConvertSettings(to="gqa", kv_budget=f"{percent}%"))
                assert (plan.refusals, plan.kv_heads) == ([], wanted)


def test_budget_of_the_settings_file_may_be_a_number() -> None:
    assert make_plan(LLAMA_31_8B, parse_settings(ConvertSettings, {"to": "gqa", "kv_budget": 0.25})).kv_heads == 2


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            {"to": "gqa", "kv_heads": 3},
            r"heads 3 .* divide into 1, 2, 4, 8; the nearest is --kv-heads 2, a budget of 0.25",
        ),
        ({"to": "gqa", "kv_heads": 16}, r"the nearest is --kv-heads 8, a budget of 1"),
        ({"to": "gqa", "kv_budget": "30%"}, r"--kv-budget 30% is not possible.*nearest is --kv-heads 2, a budget of 0.25"),
        ({"to": "gqa"}, r"needs either --kv-heads or --kv-budget: its 8 key heads divide into 1, 2, 4, 8"),
        ({"to": "gqa", "kv_heads": 2, "kv_budget": "25%"}, r"needs either --kv-heads or --kv-budget"),
        ({"to": "gqa", "kv_budget": "0%"}, r"is no share of the source's cache: write 25% or 0.25"),
        ({"to": "mqa", "kv_heads": 2}, r"mqa has one key head: .* use --to gqa"),
        ({"to": "mqq"}, r"unknown target 'mqq'. Did you mean mqa\?"),
        ({"to": "mqa", "method": "medium"}, r"unknown method 'medium'.*Available: mean, first, random, align, pca"),
        ({"to": "mqa", "dtype": "bf61"}, r"unknown dtype 'bf61'. Did you mean bf16\?"),
        ({"to": "mqa", "max_shard_size": "5 apples"}, r"5 apples is no size"),
        ({"to": "mqa", "calibrate": "x.txt", "window": 200_000}, r"--window 200000 exceeds the 131072 .* give --window 131072"),
    ],
)
def test_refusals_collect_and_raise(settings: dict[str, Any], refusal: str) -> None:
    plan = make_plan(LLAMA_31_8B, ConvertSettings(**settings))
    assert len(plan.refusals) == 1
    with pytest.raises(UserError, match=refusal):
        plan.refuse()


def test_refused_plans_are_shown_and_all_refusals_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    code, text = invoke("plan", tmp_path, "--to", "gqa", "--kv-heads", 3, "--method", "pac", "--json", tmp_path / "plan.json")
    assert code == 2
    assert re.search(r"^kvfold: --kv-heads 3 .*; unknown method 'pac'. Did you mean pca\?", text)
    assert len(json.loads((tmp_path / "plan.json").read_text())["refusals"]) == 2


@pytest.mark.parametrize(
    ("settings", "method", "grouping"),
    [
        ({}, "align", "similar"),
        ({"calibrate": "self"}, "pca", "similar"),
        ({"method": "mean"}, "mean", "neighbours"),
        ({"method": "mean", "grouping": "similar"}, "mean", "similar"),
        ({"calibrate": "self", "method": "align", "grouping": "neighbours"}, "align", "neighbours"),
    ],
)
def test_method_and_grouping_by_default(settings: dict[str, Any], method: str, grouping: str) -> None:
    plan = make_plan(LLAMA_31_8B, ConvertSettings(to="mqa", **settings))
    assert (plan.method, plan.grouping, plan.refusals) == (method, grouping, [])


def test_the_cache_has_the_checkpoints_dtype_unless_told_otherwise() -> None:
    settings = ConvertSettings(to="mqa")
    assert cache_dtype(LLAMA_2_7B, settings) == "float16"
    assert cache_dtype({**LLAMA_2_7B, "dtype": "bfloat16"}, settings) == "bfloat16"  # transformers 5 writes `dtype`
    assert cache_dtype({"model_type": "llama"}, settings) == "float32"
    assert cache_dtype(LLAMA_2_7B, ConvertSettings(to="mqa", dtype="bf16")) == "bfloat16"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("2GiB", 2**31),
        ("1.5kb", 1500),
        (" 64 KiB ", 65536),
        ("1000000", 10**6),
        ("12B", 12),
        *((text, None) for text in ("", "GB", "-1GB", "0", "0.0MB", "5TB", "1e9", "5 G", "5GBs", "five", "None")),
    ],
)
def test_parse_size(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(UserError, match=re.escape(f"{text} is no size: write 5GB, 500MB or 2GiB")):
            parse_size(text)
    else:
        assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (None, None),
        ("bf16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("float16", "float16"),
        ("fp32", "float32"),
        ("f32", "float32"),
        ("float32", "float32"),
    ],
)
def test_normal_dtype(text: str | None, name: str | None) -> None:
    assert normal_dtype(text) == name


@pytest.mark.parametrize("text", ["", "int8", "float64", "fp8", "auto"])
def test_no_dtype(text: str) -> None:
    with pytest.raises(UserError, match=f"unknown dtype '{text}'.*Available: float32, bfloat16, float16"):
        normal_dtype(text)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("25%", 0.25),
        ("0.25", 0.25),
        (" 12.5 % ", 0.125),
        (".5", 0.5),
        ("100%", 1.0),
        ("1", 1.0),
        *((text, None) for text in ("", "%", ".", "0", "0%", "-25%", "130%", "1.01", "abc", "1/4", "1.2.3", "nan")),
    ],
)
def test_parse_budget(text: str, share: float | None) -> None:
    if share is None:
        with pytest.raises(UserError, match=re.escape(f"--kv-budget {text} is no share of the source's cache")):
            parse_budget(text)
    else:
        assert parse_budget(text) == share


def test_unknown_names_suggest_the_nearest() -> None:
    assert unknown("method", "algin", ["mean", "align"]) == "unknown method 'algin'. Did you mean align? Available: mean, align"
    assert unknown("method", "xyz", ["mean", "align"]) == "unknown method 'xyz'. Available: mean, align"


def test_settings_name_every_mistake() -> None:
    with pytest.raises(UserError) as caught:
        parse_settings(ConvertSettings, {"to": "gqa", "heal_steps": -1, "windw": 4, "seed": "x"})
    for words in ("heal_steps: input should be greater than", "'windw'. Did you mean window?", "seed: ", "got x"):
        assert words in str(caught.value)
    assert parse_settings(ConvertSettings, {"to": "mqa"}).model_dump() == ConvertSettings(to="mqa").model_dump()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "gpt2"},
            "What stands in the way: its positions are learned ones, not a RoPE's. Instead: keep it as it is",
        ),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "its attention is MLA already"),
        ({"model_type": "x", "blocksparse_block_size": 64}, "its attention leaves out most keys"),
        ({"model_type": "mllama", "text_config": {"cross_attention_layers": [3]}}, "some of its layers attend to an image"),
        ({"model_type": "zamba2", "mamba_num_heads": 4}, "some of its layers are state-space ones and keep no keys"),
        ({"model_type": "x", "kv_lora_rank": 8, "quantization_config": {"quant_method": "fp8"}}, "quantised too (fp8)"),
        ({"model_type": "lama"}, "transformers has no class of that name. The nearest is llama."),
        ({"model_type": ["llama"]}, "is not a family kvfold knows"),
    ],
)
def test_unknown_families_are_told_what_stands_in_the_way(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        family_of(config)


# Latent attention

LATENT_FACTS = {**LLAMA_2_7B, "torch_dtype": "bfloat16"}


def test_latent_budget_picks_rank_and_rotary_width() -> None:
    """10000^(-2i/128) · 4096 ≥ 1 holds for i up to 57: 58 pairs need their rotation."""
    for budget, wanted in (("50%", (3980, 116)), ("25%", (1932, 116)), ("6.25%", (396, 116)), ("0.05%", (2, 2))):
        plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_budget=budget))
        assert plan.refusals == []
        assert (plan.kv_rank, plan.rope_dim) == wanted
        assert plan.cache_numbers == sum(wanted)
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_rank=512))
    assert (plan.kv_rank, plan.rope_dim, plan.kv_budget) == (512, 64, 576 / 8192)
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_budget="12.5%", rope_dim=32))
    assert (plan.kv_rank, plan.rope_dim) == (992, 32)


@pytest.mark.parametrize(
    ("config", "settings", "refusal"),
    [
        ({}, {}, "--to mla needs either --kv-rank"),
        ({}, {"kv_rank": 512, "kv_budget": "25%"}, "either --kv-rank"),
        ({}, {"kv_rank": 512, "kv_heads": 4}, "--kv-heads belongs to --to gqa or mqa, not mla: leave it out"),
        ({}, {"kv_rank": 512, "key_norm": "mean"}, "--key-norm mean belongs to models whose keys go through a norm"),
        ({}, {"to": "gqa", "kv_heads": 8, "key_norm": "mean"}, "--key-norm mean belongs to --to mla or mfa or mfa-kr, not gqa"),
        ({"model_type": "qwen3"}, {"kv_rank": 9, "keys": "rebuilt", "key_norm": "mean"}, "--key-norm mean has nothing to save"),
        ({}, {"kv_rank": 512, "rope_dim": 63}, "--rope-dim 63 must be even and at most the source's 128: the nearest is 62"),
        ({}, {"kv_rank": 512, "rope_dim": 256, "layout": "deepseek_v3"}, "the nearest is 128"),
        ({}, {"kv_rank": 512, "rope_dim": 4098}, "the source's 4096: the nearest is 4096"),
        ({}, {"kv_rank": 512, "rope_dim": 64, "keys": "rebuilt"}, "leave --rope-dim out"),
        ({}, {"kv_rank": 512, "q_rank": 5000}, "--q-rank 5000 is over the full rank 4096"),
        ({}, {"kv_rank": 512, "width": 64}, "--width belongs to --to mfa or mfa-kr, not mla: leave it out"),
        (
            {},
            {"kv_rank": 512, "layout": "kvfold", "pad_for": "vllm"},
            "pads for engines, and this is the kvfold layout",
        ),
        ({}, {"to": "mfa", "width": 63}, "--width 63 must be even and between 2 and the full width 4096: the nearest is 62"),
        ({}, {"to": "mfa", "width": 5000}, "the nearest is 4096"),
        ({}, {"to": "mfa-kr", "width": 1}, "between 2 and the full width 8192: the nearest is 2"),
        ({}, {"to": "mfa"}, "--to mfa needs either --width or --kv-budget"),
        ({}, {"to": "mfa", "kv_budget": "0.02%"}, "leaves 1 numbers: the least is 0.05%"),
        ({}, {"to": "mfa", "width": 64, "layout": "deepseek_v3"}, "--layout deepseek_v3 belongs to --to mla, not mfa"),
        ({}, {"to": "gqa", "kv_heads": 8, "layout": "kvfold"}, "--layout kvfold belongs to --to mla or mfa or mfa-kr, not gqa"),
        ({}, {"to": "mfa", "width": 64, "kv_rank": 8}, "--kv-rank belongs to --to mla, not mfa"),
        ({}, {"kv_rank": 5000}, "between 1 and the full rank 4096: the nearest is 4096"),
        ({}, {"kv_rank": 0}, "the nearest is 1"),
        ({}, {"kv_budget": "0.01%"}, "leaves 0 numbers: the least is 0.05%"),
        ({}, {"kv_budget": "lots"}, "write 25% or 0.25"),
        (
            {},
            {"kv_rank": 512, "method": "pca"},
            "unknown method 'pca'. Available: kvfold, svd-split, svd-joint, partial-rope-high",
        ),
        ({}, {"kv_rank": 512, "method": "roroe"}, "unknown method 'roroe'. Did you mean rorope?"),
        ({}, {"to": "mfa", "width": 64, "method": "rorope"}, "unknown method 'rorope'. Available: kvfold"),
        (
            {},
            {"kv_rank": 60, "rope_dim": 4, "method": "svd-joint"},
            "rotates at least 64 numbers, which leaves no latent of 64",
        ),
        ({}, {"kv_budget": "0.5%", "method": "svd-split"}, "the least is --kv-rank 1 --rope-dim 64, or --kv-budget 0.80%"),
        ({}, {"kv_rank": 512, "rope_dim": 64, "method": "whitened"}, "--method whitened has no rotary key of its own"),
        ({}, {"kv_rank": 512, "keys": "rebuilt", "method": "rorope"}, "leave --keys out, or use --method whitened"),
        (
            {},
            {"kv_rank": 9, "layer_budgets": "measured", "method": "rorope"},
            "--method rorope has the same widths in every layer",
        ),
        ({}, {"kv_rank": 512, "rope_dim": 63, "method": "rorope"}, "--rope-dim 63 must be even"),
        ({}, {"kv_rank": 5000, "method": "rorope"}, "between 1 and the full rank 4096"),
        (
            {},
            {"kv_rank": 512, "method": "rorope", "layout": "deepseek_v3"},
            "--method rorope leaves what deepseek_v3 cannot say",
        ),
    ],
)
def test_latent_refusals(config: dict[str, Any], settings: dict[str, Any], refusal: str) -> None:
    plan = make_plan({**LATENT_FACTS, **config}, ConvertSettings(**{"to": "mla", **settings}))
    assert any(refusal in reason for reason in plan.refusals), plan.refusals


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        ({}, {"kv_rank": 512, "dtype": "fp16"}, "float16 cannot hold the scaled latents"),
        ({"torch_dtype": "float16"}, {"kv_rank": 512}, "float16 cannot hold the scaled latents"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, {"kv_rank": 512}, "rope type linear"),
        ({"attention_bias": True}, {"kv_rank": 512}, "attention biases"),
        ({"mlp_bias": True}, {"kv_rank": 512}, "MLP biases"),
        ({"hidden_act": "gelu"}, {"kv_rank": 512}, "gelu"),
        ({"model_type": "mistral", "sliding_window": 4096}, {"kv_rank": 512}, "sliding window"),
        ({"model_type": "qwen2"}, {"kv_rank": 512}, "attention biases"),
    ],
)
def test_what_deepseek_v3_cannot_say_goes_to_our_own_layout(
    config: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    facts = {**LATENT_FACTS, **config}
    plan = make_plan(facts, ConvertSettings(to="mla", **settings))
    assert (plan.layout, plan.refusals) == ("kvfold", [])
    assert reason in plan.note
    plan = make_plan(facts, ConvertSettings(to="mla", layout="deepseek_v3", **settings))
    assert any(reason in refusal and "use --layout kvfold" in refusal for refusal in plan.refusals)


def test_biases_that_are_read_off_the_input_go_into_deepseek_v3() -> None:
    facts = {**LATENT_FACTS, "model_type": "qwen2"}
    settings = {"to": "mla", "kv_rank": 512, "biases": "regressed"}
    plan = make_plan(facts, ConvertSettings(**settings))
    assert (plan.layout, plan.refusals) == ("deepseek_v3", [])
    assert "biases are read off the input where it is nearly constant" in plan.note
    for config, changed, reason in (
        ({"model_type": "llama"}, {}, "--biases regressed belongs to sources whose queries, keys and values have biases"),
        ({"model_type": "llama", "attention_bias": True}, {}, "that of its output among them"),
        ({}, {"layout": "kvfold"}, "--biases regressed is for deepseek_v3, and this is the kvfold layout"),
        ({}, {"to": "mfa", "kv_rank": None, "width": 64}, "--biases regressed belongs to --to mla, not mfa"),
    ):
        plan = make_plan({**facts, **config}, ConvertSettings(**{**settings, **changed}))
        assert any(reason in refusal for refusal in plan.refusals), plan.refusals
    with pytest.raises(UserError, match="--to mla needs calibration text"):
        make_plan(facts, ConvertSettings(**settings)).refuse(converting=True)


def test_llama3_is_said_in_deepseek_v3_by_its_plain_frequencies() -> None:
    """Of Llama 3.1's 64 pairs 29 have wavelengths below 8192 / 4 tokens; 58 + 6 zeros is the 64 that vLLM's kernels take."""
    family_spec = make_plan(LLAMA_31_8B, ConvertSettings(to="mqa")).spec
    assert family_spec.rope.plain_pairs(128) == 29
    for settings, widths in (
        ({"kv_rank": 512}, (512, 58)),
        ({"kv_rank": 512, "rope_dim": 32}, (512, 32)),
        ({"kv_budget": "25%"}, (454, 58)),
    ):
        plan = make_plan(LLAMA_31_8B, ConvertSettings(to="mla", **settings))
        assert (plan.layout, plan.refusals, plan.kv_rank, plan.rope_dim) == ("deepseek_v3", [], *widths)
    plan = make_plan(LLAMA_31_8B, ConvertSettings(to="mla", kv_rank=512, pad_for="vllm"))
    assert plan.stored == LatentShape(512, 64, 128, 128)
    plan = make_plan(LLAMA_31_8B, ConvertSettings(to="mla", kv_rank=512, rope_dim=64))
    assert plan.layout == "kvfold" and "slows all frequencies but the first 29, so --rope-dim 58 at most" in plan.note


def test_budgets_of_mfa_and_its_like() -> None:
    """2·32·128 = 8192 numbers in the source; the 93.7 % of 2412.19255 is a key of 512 for 32 heads of 128."""
    for to, budget, widths in (("mfa", "25%", (1024, 1024)), ("mfa-kr", "12.5%", (0, 1024)), ("mfa-kr", "6.25%", (0, 512))):
        plan = make_plan(LATENT_FACTS, ConvertSettings(to=to, kv_budget=budget))
        assert (plan.kv_rank, plan.rope_dim, plan.layout) == (*widths, "kvfold")
        assert plan.kv_budget == parse_budget(budget)
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", keys="rebuilt", kv_budget="25%"))
    assert (plan.kv_rank, plan.rope_dim, plan.design) == (2048, 0, "rebuilt-key")


def test_mfa_in_step3_text() -> None:
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mfa", width=128, layout="step3_text"))
    assert (plan.stored, plan.q_rank, plan.architecture) == (LatentShape(128, 128, 0, 128), 4096, "Step3TextForCausalLM")
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mfa", width=100, layout="step3_text"))
    assert (plan.stored.rope, plan.cache_numbers) == (112, 224)
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mfa", width=100, layout="step3_text", pad_for="none", q_rank=512))
    assert (plan.cache_numbers, plan.q_rank) == (200, 512)
    for config, settings, reason in (
        ({}, {"width": 256}, "a key wider than 128 repeats frequencies"),
        ({"model_type": "qwen2"}, {"width": 64}, "attention biases"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"width": 64}, "rope type yarn"),
        ({}, {"width": 64, "layer_budgets": "measured"}, "the same widths in every layer"),
        ({}, {"width": 64, "dtype": "fp16"}, "float16 cannot hold"),
    ):
        plan = make_plan({**LATENT_FACTS, **config}, ConvertSettings(to="mfa", layout="step3_text", **settings))
        assert any(reason in refusal and "use --layout kvfold" in refusal for refusal in plan.refusals), plan.refusals
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_rank=64, layout="step3_text"))
    assert "--layout step3_text belongs to --to mfa, not mla: leave it out" in plan.refusals


@pytest.mark.parametrize(
    ("settings", "widths", "note"),
    [
        ({"method": "svd-joint", "kv_rank": 512, "rope_dim": 64}, (512, 64), ""),
        ({"method": "svd-joint", "kv_rank": 512, "rope_dim": 100}, (548, 64), "64 numbers in place of 100"),
        ({"method": "partial-rope-2norm", "kv_rank": 512, "rope_dim": 32}, (480, 64), "64 numbers in place of 32"),
        ({"method": "partial-rope-low", "kv_budget": "25%"}, (1024, 1024), ""),
        ({"method": "svd-split", "kv_budget": "0.80%"}, (1, 64), "64 numbers in place of 32"),
        ({"method": "rorope", "kv_rank": 512, "rope_dim": 60}, (540, 32), "32 numbers in place of 60"),
        ({"method": "rorope", "kv_rank": 512, "rope_dim": 300}, (556, 256), "the latent has the rest of the 812"),
        ({"method": "whitened", "kv_budget": "25%"}, (2048, 0), ""),
    ],
)
def test_published_methods_have_the_cache_that_was_asked_for(
    settings: dict[str, Any], widths: tuple[int, int], note: str
) -> None:
    """MHA2MLA rotates 2·32 numbers or a multiple, TransMLA a divisor of 128 or a multiple; the latent takes the rest."""
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", **settings))
    assert (plan.kv_rank, plan.rope_dim, plan.layout, plan.refusals) == (*widths, "kvfold", [])
    assert note in plan.note
    assert ("rotates" in plan.note) == bool(note)
    assert plan.cache_numbers == sum(widths)
    assert plan.design == ("rebuilt-key" if settings["method"] == "whitened" else "latent")


def test_latent_needs_calibration_only_to_convert_and_its_flags_belong_to_it() -> None:
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_rank=512))
    plan.refuse()
    with pytest.raises(UserError, match="needs calibration text: give --calibrate TEXT, or --calibrate self"):
        plan.refuse(converting=True)
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="gqa", kv_heads=8, kv_rank=512))
    assert any("--kv-rank belongs to --to mla, not gqa" in reason for reason in plan.refusals)


def test_padding_for_vllm() -> None:
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_rank=512, rope_dim=64))
    assert plan.stored == LatentShape(512, 64, 128, 128)
    assert plan.note == "padded for vLLM's kernels, 0 cached numbers of zeros"
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_rank=480, rope_dim=64))
    assert plan.stored == LatentShape(480, 64, 128, 128)
    assert "--pad-for vllm would cache 576 numbers" in plan.note
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_rank=480, rope_dim=32, pad_for="vllm"))
    assert (plan.stored, plan.cache_numbers) == (LatentShape(512, 64, 128, 128), 576)
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_rank=64, rope_dim=32, pad_for="vllm-cpu"))
    assert plan.stored == LatentShape(512, 64, 128, 128)  # the one shape that the CPU kernel takes
    plan = make_plan(LATENT_FACTS, ConvertSettings(to="mla", kv_rank=512, rope_dim=128, pad_for="vllm"))
    assert "--rope-dim 64 or less and --kv-rank 512 or less" in plan.refusals[0]
    plan = make_plan(TINYLLAMA, ConvertSettings(to="mla", kv_rank=256, rope_dim=64))
    assert plan.stored == LatentShape(256, 64, 64, 128)  # heads of 64: values padded, the cache as it is


GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
FULL = (5, 11, 17, 23)


def test_of_mixed_layers_those_that_attend_over_everything_are_folded_and_all_are_counted() -> None:
    """Gemma 3 1B caches 512 numbers a layer; 22 of its 26 layers keep 512 tokens of them at most."""
    plan = make_plan(GEMMA_3_1B, ConvertSettings(to="mla", kv_budget="50%"))
    assert (plan.refusals, plan.layout, plan.folded) == ([], "kvfold", FULL)
    assert plan.spec.rope == plain(1e6)
    assert plan.layer_numbers(5) == 256 and plan.layer_numbers(4) == 512  # of the half, one number is the size of the key
    assert plan.cache_numbers == (22 * 512 + 4 * 256) / 26
    assert plan.cache_bytes(32768, 1, "bfloat16") == ((22 * 512 + 4 * 32768) * 1024, 22 * 512 * 1024 + 4 * 32768 * 512)
    every = make_plan(GEMMA_3_1B, ConvertSettings(to="mla", kv_budget="50%", layers="all"))
    assert (every.refusals, every.folded, every.cache_numbers) == ([], tuple(range(26)), 256)
    assert "the MLP's gelu_pytorch_tanh cannot be said" in every.note  # where Gemma calls it hidden_activation
    assert make_plan(GEMMA_3_1B, ConvertSettings(to="mla", kv_budget="50%", layers="5,10-11")).folded == (5, 10, 11)
    assert make_plan(MISTRAL, ConvertSettings(to="mfa", width=64)).folded == tuple(range(32))  # all have a window


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        (
            GEMMA_3_1B,
            {"layers": "4-5"},
            "layer 4, which looks back over 512 tokens, so that its cache is small already",
        ),
        (GEMMA_3_1B, {"layers": "5,26"}, "names layer 26, and there are 0 to 25"),
        (GEMMA_3_1B, {"layers": "11-5"}, "write the lower number first"),
        (GEMMA_3_1B, {"layers": "last"}, "--layers last names no layers: write all, full, or numbers like 0-3,7"),
        (MISTRAL, {"layers": "full"}, "all layers attend over 4096 tokens"),
        (GEMMA_3_1B, {"to": "mqa", "width": None, "layers": "full"}, "--layers full belongs to --to mla or mfa or mfa-kr"),
        (GEMMA_3_1B, {"to": "mla", "width": None, "kv_rank": 64, "layout": "deepseek_v3"}, "layers are of several kinds"),
    ],
)
def test_layers_that_cannot_be_folded_are_refused(config: dict[str, Any], settings: dict[str, Any], reason: str) -> None:
    given = {"to": "mfa", "width": 64, **settings}
    assert any(reason in refusal for refusal in make_plan(config, ConvertSettings(**given)).refusals)


def test_heads_behind_layernorms_are_not_merged() -> None:
    """They cache a number for each key, and none of the mean size."""
    config = {**LLAMA_31_8B, "model_type": "cohere", "architectures": ["CohereForCausalLM"], "use_qk_norm": True}
    config = {key: value for key, value in config.items() if key not in ("rope_scaling", "rms_norm_eps")}
    refusals = make_plan(config, ConvertSettings(to="gqa", kv_heads=4)).refusals
    assert any("a LayerNorm of its own (use_qk_norm), behind which heads cannot be merged" in reason for reason in refusals)
    assert make_plan({**config, "use_qk_norm": False}, ConvertSettings(to="gqa", kv_heads=4)).refusals == []
    for key_norm, numbers in (("cached", 8), ("mean", 0)):
        plan = make_plan(config, ConvertSettings(to="mla", kv_rank=448, rope_dim=64, key_norm=key_norm))
        assert (plan.refusals, plan.cache_numbers) == ([], 512 + numbers)
