"""From checkpoint to checkpoint: every family loads in plain transformers and says what the surgery says."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from kvfold.convert import folding
from kvfold.convert.calibration import Observed
from kvfold.convert.families import FAMILIES, family_of
from kvfold.convert.layouts import deepseek_v3
from kvfold.convert.methods import best
from kvfold.convert.pipeline import convert
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source import stream
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.data import sample_from_source
from kvfold.convert.source.stream import Block, HiddenStates, SourceModel
from kvfold.errors import ConversionError
from kvfold.evaluation.layers import measure_cache
from kvfold.surgery.attention import GroupedAttention
from kvfold.surgery.designs import design
from kvfold.surgery.kvfold_attention import exchange
from kvfold.surgery.latent import attention_seen
from kvfold.surgery.lowrank import SecondMoment
from kvfold.surgery.refit import OutputRegression
from tests.helpers import MIXED, OTHERS, SIMILAR, save_model, save_tokens

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"attention_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama3", {}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"num_key_value_heads": 4, "attention_bias": True}),
    *((family, {"num_key_value_heads": 4}) for family in (*OTHERS, *SIMILAR)),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    ("gpt_neox", {}),
    ("cohere", {"num_key_value_heads": 4, "use_qk_norm": True}),
    *((family, {"num_key_value_heads": 4}) for family in MIXED),
]
GROUPED = [pair for pair in VARIANTS if pair[0] == "llama3" or family_of({"model_type": pair[0], **pair[1]}).grouped]
"""Those whose class can have fewer key heads."""
IDS = torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(9))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder)(IDS).logits


@torch.no_grad()
def decoded_as_uncached(model: Any) -> Any:
    """Assert that decoding token by token gives the logits of one pass, and return the cache."""
    first = model(IDS[:, :20], use_cache=True)
    cache, steps = first.past_key_values, [first.logits]
    for t in range(20, 40):
        steps.append(model(IDS[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(IDS).logits, atol=1e-4, rtol=1e-4)
    return cache


def fold(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return convert(str(source), out, ConvertSettings(**{"to": "gqa", "heal_steps": 0, **settings})).record


def test_the_memory_of_a_layer_goes_with_its_block(tmp_path: Path) -> None:
    reader = CheckpointReader(save_model(tmp_path / "source", "llama"))
    source = SourceModel(reader, family_of(reader.config), torch.device("cpu"), 40)
    held = [weakref.ref(source.block(layer).layer.mlp.up_proj.weight) for layer in range(2)]
    assert [weight() for weight in held] == [None, None]


def test_every_family_is_listed_here() -> None:
    assert {name for name, _ in VARIANTS} - {"llama3"} == set(FAMILIES)  # llama3 is llama with another rope type


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_lifted_attention_is_the_transformers_class(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "source", family, **changes)
    reader = CheckpointReader(folder)
    known = family_of(reader.config)
    spec = known.spec(reader.config)
    source = SourceModel(reader, known, torch.device("cpu"), 40)
    hidden = torch.randn(2, 40, spec.hidden_size, generator=torch.Generator().manual_seed(3))
    for layer in range(spec.layers):
        block = source.block(layer)
        names = known.names(layer, spec)
        attention = GroupedAttention(known.lift({role: reader.tensor(name) for role, name in names.items()}, spec))
        with torch.no_grad():
            wanted = block.passed(hidden)[1]
            with block.attention(attention):
                got = block.passed(hidden)[1]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_the_stream_runs_the_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Hidden states layer by layer are those of the whole model."""
    folder = save_model(tmp_path / "source", family, **changes)
    reader = CheckpointReader(folder)
    known = family_of(reader.config)
    source = SourceModel(reader, known, torch.device("cpu"), IDS.shape[1])
    states = source.embed(IDS, tmp_path / "states")
    with torch.no_grad():
        wanted = load(folder)(IDS, output_hidden_states=True).hidden_states
    for layer in range(known.spec(reader.config).layers - 1):
        torch.testing.assert_close(states.data, wanted[layer], atol=1e-5, rtol=1e-5)
        block = source.block(layer)
        with torch.no_grad():
            known = block.passed(states.data[:1])  # goes behind the layer as it is
        block.advance(states, known=(*known[:2], known[2] + layer))
        states.data[:1] -= layer


def test_a_sources_attention_is_written_out_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its class asks of the fused kernel; what the model is beside the stream stays as it is."""
    asked: list[torch.Size] = []
    attend = stream.attend
    monkeypatch.setattr(stream, "attend", lambda q, *rest: asked.append(q.shape) or attend(q, *rest))
    reader = CheckpointReader(save_model(tmp_path / "source", "llama"))
    block, hidden = SourceModel(reader, family_of(reader.config), torch.device("cpu"), 40).block(0), torch.randn(2, 40, 64)
    with torch.no_grad():
        found = block.passed(hidden)[2]
        assert asked == [(2, 8, 40, 8)]
        torch.testing.assert_close(found, block(hidden), atol=1e-5, rtol=1e-5)
    assert len(asked) == 1


def test_a_wide_stream_is_as_exact_as_its_choices_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU multiplies bfloat16: the same candidates, and block errors but for what rounding adds."""
    source, settings = save_model(tmp_path / "source", "llama", num_hidden_layers=3), {"to": "mla", "kv_budget": 0.25}
    tokens = save_tokens(tmp_path / "tokens.safetensors", 24, 32)
    wanted = fold(source, tmp_path / "exact", calibrate=tokens, **settings)["layers"]
    monkeypatch.setattr("kvfold.convert.source.stream.WIDE", 1)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    found = fold(source, tmp_path / "quick", calibrate=tokens, **settings)["layers"]
    assert [layer["choice"] for layer in found] == [layer["choice"] for layer in wanted]
    errors = [[layer["block_error"] for layer in layers] for layers in (found, wanted)]
    assert errors[0] != errors[1]
    assert errors[0] == pytest.approx(errors[1], rel=3e-3)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"to": "mla", "layout": "kvfold"}),
        ("llama", {"to": "mla", "q_rank": 16}),
        ("qwen3", {"to": "mla"}),
        ("mistral", {"to": "mfa-kr"}),
        ("qwen2", {"to": "mla"}),
    ],
)
def test_a_wide_layer_is_folded_in_float32_as_in_float64(
    family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokens = save_model(tmp_path / "source", family), save_tokens(tmp_path / "tokens.safetensors", 24, 32)
    wanted = fold(source, tmp_path / "exact", calibrate=tokens, kv_budget=0.25, **settings)["layers"]
    dtypes: set[torch.dtype] = set()
    monkeypatch.setattr(folding, "best", lambda *args: dtypes.add(args[1].layer.root.dtype) or best(*args))
    monkeypatch.setattr("kvfold.convert.calibration.SINGLE", 1)
    found = fold(source, tmp_path / "single", calibrate=tokens, kv_budget=0.25, **settings)["layers"]
    assert dtypes == {torch.float64 if family == "qwen2" else torch.float32}  # biases may be far larger than keys
    assert [layer["choice"] for layer in found] == [layer["choice"] for layer in wanted]
    errors = [[layer["block_error"] for layer in layers] for layers in (found, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=3e-3)


def test_the_moment_that_is_folded_under_counts_tokens_by_their_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine tenths by what they receive, one tenth alike: of the sample, which is all of so short a text."""
    seen: list[Observed] = []
    monkeypatch.setattr(folding, "best", lambda plan, found, layer: seen.append(found) or best(plan, found, layer))
    source, tokens = save_model(tmp_path / "source", "llama"), save_tokens(tmp_path / "tokens.safetensors", 24, 32)
    fold(source, tmp_path / "out", to="mla", kv_budget=0.25, calibrate=tokens)
    reader = CheckpointReader(source)
    first, block = seen[0], SourceModel(reader, family_of(reader.config), torch.device("cpu"), 32).block(0)
    received = attention_seen(first.weights, first.sample, block.rope)[1]
    by_attention, alike = SecondMoment(first.sample.shape[-1]), SecondMoment(first.sample.shape[-1])
    by_attention.add(first.sample, received)
    alike.add(first.sample)
    torch.testing.assert_close(first.attended, 0.9 * by_attention.value() + 0.1 * alike.value(), rtol=1e-6, atol=1e-9)


def test_the_output_is_fitted_on_as_many_tokens_as_it_has_use_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every fourth of all windows it comes near to what all of them give."""
    source, tokens = save_model(tmp_path / "source", "llama"), save_tokens(tmp_path / "tokens.safetensors", 96, 32)
    add, read = OutputRegression.add, [0]

    def counting(self: OutputRegression, heads: Tensor, missing: Tensor, energy: Tensor) -> None:
        read[0] += energy.numel()
        add(self, heads, missing, energy)

    monkeypatch.setattr(OutputRegression, "add", counting)
    errors = []
    for number, (fitted, share) in enumerate([(48, 1), (12, 4)]):
        monkeypatch.setattr("kvfold.convert.calibration.FITTED", fitted)
        read[0] = 0
        layers = fold(source, tmp_path / str(number), to="mla", kv_budget=0.25, calibrate=tokens)["layers"]
        assert read[0] * share == 96 * 32 * len(layers)
        errors.append([layer["block_error"] for layer in layers])
    assert errors[1] == pytest.approx(errors[0], rel=0.1) and errors[1] != errors[0]


def test_large_biases_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of keys a hundred times what tells keys apart: such a stream stays float32, however wide."""
    folder = save_model(tmp_path / "source", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data *= 300
    model.save_pretrained(folder)
    tokens, settings = save_tokens(tmp_path / "tokens.safetensors", 24, 32), {"to": "mla", "kv_budget": 0.5}
    wanted = fold(folder, tmp_path / "exact", calibrate=tokens, **settings)["layers"]
    monkeypatch.setattr("kvfold.convert.source.stream.WIDE", 1)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    found = fold(folder, tmp_path / "quick", calibrate=tokens, **settings)["layers"]
    assert [layer["block_error"] for layer in found] == [layer["block_error"] for layer in wanted]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("family", "changes"), GROUPED)
def test_identity_conversion_is_exact(family: str, changes: dict[str, Any], calibrated: bool, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", family, **changes)
    tokens = save_tokens(tmp_path / "tokens.safetensors", 6, 32) if calibrated else None
    heads = AutoConfig.from_pretrained(source).num_key_value_heads
    fold(source, tmp_path / "out", kv_heads=heads, calibrate=tokens)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", [{"to": "gqa", "kv_heads": 2}, {"to": "mqa"}])
@pytest.mark.parametrize(("family", "changes"), GROUPED)
def test_folded_checkpoint_loads_decodes_and_keeps_what_it_must(
    family: str, changes: dict[str, Any], to: dict[str, Any], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", family, dtype=torch.bfloat16, **changes)
    (source / "LICENSE").write_text("theirs")
    (source / "README.md").write_text("the source's card")
    tokens = save_tokens(tmp_path / "tokens.safetensors", 6, 32)
    record = fold(source, tmp_path / "out", calibrate=tokens, heal_steps=3, heal_batch_tokens=64, **to)
    kept = 1 if to["to"] == "mqa" else 2

    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "out")
    narrowed = {"k_proj", "v_proj"}
    for name, entry in after.entries.items():
        assert entry.dtype == torch.bfloat16
        if "self_attn" not in name:
            assert torch.equal(after.tensor(name), before.tensor(name)), name
        elif name.split(".")[-2] in narrowed:
            assert entry.shape[0] == kept * 8
    assert ("lm_head.weight" in after.entries) == (not changes.get("tie_word_embeddings", False))
    changed = {k for k in after.config.keys() | before.config.keys() if after.config.get(k) != before.config.get(k)}
    assert changed <= {"num_key_value_heads", "head_dim"}
    assert (tmp_path / "out" / "LICENSE").read_text() == "theirs"
    assert not (tmp_path / "out" / "README.md").exists()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert model.config.num_key_value_heads == kept
    cache = decoded_as_uncached(model)
    assert cache.layers[0].keys.shape[1] == kept
    assert record["cache_numbers_per_token_per_layer"] == 2 * kept * 8
    assert len(record["layers"]) == len(cache.layers)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 44)


LATENT_SOURCES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    ("mistral", {}),
]


@pytest.mark.parametrize("pad_for", ["none", "vllm"])
@pytest.mark.parametrize(("family", "changes"), LATENT_SOURCES)
def test_deepseek_v3_says_what_the_latent_attention_says(
    family: str, changes: dict[str, Any], pad_for: str, tmp_path: Path
) -> None:
    """The stock class on the written checkpoint against the source model with the same factors in its attention's place.

    It holds padding, interleaving, θ', softmax scale, linear norm, residual rescale and the written-out head to 1e-4.
    """
    source = save_model(tmp_path / "source", family, **changes)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    shape = {"to": "mla", "kv_rank": 24, "rope_dim": 4, "pad_for": pad_for}
    fold(source, tmp_path / "out", **shape, calibrate=tokens)
    reader = CheckpointReader(tmp_path / "out")
    plan = make_plan(CheckpointReader(source).config, ConvertSettings(**shape))
    assert plan.cache_numbers == (320 if pad_for == "vllm" else 28)
    model = load(source)
    for layer, module in enumerate(model.model.layers):
        names = deepseek_v3.names(layer, plan)
        weights = deepseek_v3.lift({name: reader.tensor(name) for name in names}, plan)
        exchange(module, design(weights))
    with torch.no_grad():
        wanted = model(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - logits(source)).abs().max() > 1e-2, "the fold is lossy, or this compares nothing"


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}])
def test_a_source_of_one_key_head_comes_out_exact_in_deepseek_v3(changes: dict[str, Any], tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", num_key_value_heads=1, **changes)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    fold(source, tmp_path / "out", to="mla", kv_rank=16, rope_dim=8, calibrate=tokens)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), atol=1e-4, rtol=1e-4)


def test_biases_are_read_off_a_constant_channel_exactly_in_deepseek_v3(tmp_path: Path) -> None:
    """A source with biases whose hidden states have one large constant number: nothing is lost."""
    source = save_model(tmp_path / "source", "qwen2", num_key_value_heads=1)
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 50
    weights["model.embed_tokens.weight"][:, 0] = 1e4  # its norm takes all other numbers down with it,
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weight[0], weight[1:] = 0.125, 1e4 / 8  # and these weights bring them back
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0  # nothing else is written there
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    settings = {"to": "mla", "kv_rank": 16, "rope_dim": 8, "calibrate": tokens, "biases": "regressed"}
    done = convert(str(source), tmp_path / "out", ConvertSettings(heal_steps=0, **settings))
    record = done.record
    assert record["target"]["layout"] == "deepseek_v3"
    assert "in its most constant direction by 0.0% in the median layer" in done.notes[0]
    assert max(layer["inconstancy"] for layer in record["layers"]) < 1e-4
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("family", "changes"), LATENT_SOURCES)
def test_latent_checkpoint_loads_decodes_and_caches_latents(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", family, dtype=torch.bfloat16, **changes)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    settings = {"calibrate": tokens, "heal_steps": 3, "heal_batch_tokens": 80, "max_shard_size": "50KB"}
    record = fold(source, tmp_path / "out", to="mla", kv_rank=20, rope_dim=6, **settings)
    assert {e.dtype for e in CheckpointReader(tmp_path / "out").entries.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(model).__name__ == record["target"]["architecture"] == "DeepseekV3ForCausalLM"
    decoded_as_uncached(model)
    assert measure_cache(model, IDS[:1, :10]) == (26, 26 * 4 * model.config.num_hidden_layers)
    assert record["cache_numbers_per_token_per_layer"] == 26
    # the plan's arithmetic is the real model's
    planned = make_plan(CheckpointReader(source).config, ConvertSettings(to="mla", kv_rank=20, rope_dim=6))
    assert load(source).num_parameters() - planned.parameters_saved == model.num_parameters()


def test_dtype_and_shards_are_what_was_asked_for(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama")
    fold(source, tmp_path / "out", kv_heads=2, dtype="bf16", max_shard_size="50KB")
    reader = CheckpointReader(tmp_path / "out")
    assert {e.dtype for e in reader.entries.values()} == {torch.bfloat16}
    assert reader.config["dtype"] == "bfloat16"
    assert len({e.file for e in reader.entries.values()}) > 3
    wanted = {name: t.to(torch.bfloat16) for name, t in _untouched(source).items()}
    assert all(torch.equal(reader.tensor(name), t) for name, t in wanted.items())


def _untouched(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {n: reader.tensor(n) for n in reader.entries if "self_attn" not in n}


def test_the_same_settings_give_the_same_bytes_and_the_record_repeats_them(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama")
    tokens = save_tokens(tmp_path / "tokens.safetensors", 8, 32)
    fold(source, tmp_path / "one", kv_heads=2, calibrate=tokens, heal_steps=5, heal_batch_tokens=64)
    recorded = json.loads((tmp_path / "one" / "kvfold.json").read_text())["settings"]
    convert(str(source), tmp_path / "two", ConvertSettings(**recorded))
    assert _weights(tmp_path / "one") == _weights(tmp_path / "two")


def test_hidden_states_on_disk_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(tmp_path / "source", "llama")
    settings = {"kv_heads": 2, "calibrate": save_tokens(tmp_path / "t.safetensors", 8, 32), "heal_steps": 4}
    fold(source, tmp_path / "memory", **settings)
    monkeypatch.setattr(HiddenStates, "needs_disk", staticmethod(lambda *_, **__: True))
    fold(source, tmp_path / "disk", **settings)
    assert _weights(tmp_path / "memory") == _weights(tmp_path / "disk")
    assert not list((tmp_path / "disk").glob("*.hidden"))


@pytest.mark.parametrize(("steps", "window", "tolerance"), [(0, 2, 1e-5), (4, 2, 0.05), (4, "all", 0.05)])
def test_a_device_of_little_memory_takes_fewer_tokens_at_a_time(
    steps: int, window: int | str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, said = save_model(tmp_path / "source", "llama"), []
    settings = {"to": "mqa", "calibrate": save_tokens(tmp_path / "t.safetensors", 8, 32), "heal_steps": steps}
    settings |= {"heal_window": window, "heal_dtype": "float32"}
    fold(source, tmp_path / "enough", **settings)
    whole = Block.__call__

    def short(block: Block, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return whole(block, hidden)

    monkeypatch.setattr(Block, "__call__", short)
    most, out = 2, tmp_path / "little"
    convert(str(source), out, ConvertSettings(**settings), report=lambda share, line: said.append((share, line)))
    for ours, theirs in zip(load(out).parameters(), load(tmp_path / "enough").parameters(), strict=True):
        # Sums in another order: Adam's first steps are their signs.
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert len([line for share, line in said if share is None and "64 tokens go through" in line]) == 1
    most = 0
    with pytest.raises(ConversionError, match=r"^CUDA out of memory: free memory there and repeat with --resume"):
        convert(str(source), tmp_path / "none", ConvertSettings(**settings))
    most = 8
    convert(str(source), tmp_path / "none", ConvertSettings(**settings), resume=True)
    assert _weights(tmp_path / "none") == _weights(tmp_path / "enough")


def test_healing_brings_every_window_nearer_to_the_original(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=3)
    tokens = save_tokens(tmp_path / "t.safetensors", 128, 40)
    healing = {"heal_steps": 80, "heal_window": 2, "heal_batch_tokens": 320, "heal_lr": 0.005}
    record = fold(source, tmp_path / "out", to="mqa", calibrate=tokens, **healing)
    for layer in record["layers"]:
        assert layer["window_error"]["after"] < layer["window_error"]["before"]


def test_windows_heal_layers_between_which_one_stays_as_it_is(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=3)
    settings = {"to": "mla", "kv_rank": 16, "rope_dim": 8, "layers": "0,2", "heal_window": 2, "heal_steps": 40}
    record = fold(source, tmp_path / "out", **settings, calibrate=save_tokens(tmp_path / "t.safetensors", 32, 40))
    assert [layer["window_error"]["after"] < layer["window_error"]["before"] for layer in record["layers"]] == [True, True]


@pytest.mark.parametrize(("window", "measure"), [(2, "window_error"), ("all", "output_kl")])
def test_healing_that_does_not_help_is_undone(tmp_path: Path, window: int | str, measure: str) -> None:
    source = save_model(tmp_path / "source", "llama")
    settings = {"kv_heads": 2, "calibrate": save_tokens(tmp_path / "t.safetensors", 8, 32), "heal_steps": 4}
    record = fold(source, tmp_path / "torn", **settings, heal_window=window, heal_lr=1e3)
    closed = fold(source, tmp_path / "closed", **{**settings, "heal_steps": 0})
    assert all(layer[measure]["after"] == layer[measure]["before"] for layer in record["layers"])
    assert [layer["choice"] for layer in record["layers"]] == [layer["choice"] for layer in closed["layers"]]
    assert _weights(tmp_path / "torn") == _weights(tmp_path / "closed")


@pytest.mark.parametrize("tied", [False, True])
def test_surprise_is_the_sources_own_loss(tied: bool, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", tie_word_embeddings=tied)
    reader = CheckpointReader(source)
    weights = SourceModel(reader, family_of(reader.config), torch.device("cpu"), IDS.shape[1]).surprise(IDS)
    nll = torch.nn.functional.cross_entropy(logits(source)[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
    torch.testing.assert_close(weights[:, :-1], nll / nll.mean(), atol=1e-5, rtol=1e-5)
    assert weights[:, -1].tolist() == [1.0, 1.0]


def test_token_weights_change_the_fold(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama")
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    for kind in ("uniform", "nll"):
        fold(source, tmp_path / kind, kv_heads=2, calibrate=tokens, token_weights=kind)
    assert _weights(tmp_path / "uniform") != _weights(tmp_path / "nll")


def test_the_source_can_write_its_own_calibration_text(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", bos_token_id=1)
    record = fold(source, tmp_path / "out", kv_heads=2, calibrate="self:256", window=32)
    assert record["calibration_tokens"] == 256
    assert record["target"]["method"] == "pca"


@torch.no_grad()
def test_its_own_text_is_drawn_from_its_distribution(tmp_path: Path) -> None:
    """Every token given all before it, the first one included, which is also what pads."""
    source = save_model(tmp_path / "source", "llama", bos_token_id=1)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.lm_head.weight.normal_(std=1.0)  # what stands before must decide what comes
    model.save_pretrained(source)
    found = sample_from_source(source, 12, 48, torch.device("cpu"), 3, 4, lambda line: None).ids
    set_seed(3)
    ids = torch.full((4, 1), 1)
    while ids.shape[1] < 12:
        ids = torch.cat([ids, model(ids).logits[:, -1].softmax(-1).multinomial(1)], 1)
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("to", "healed"),
    [({"to": "gqa", "kv_heads": 2}, 0), ({"to": "gqa", "kv_heads": 2}, 40), ({"to": "mla", "kv_rank": 24, "rope_dim": 4}, 40)],
)
def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, to: dict[str, Any], healed: int) -> None:
    """SIGKILL once a layer is journalled, then --resume: the same files as a run that nobody interrupted."""
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=6)
    tokens = save_tokens(tmp_path / "t.safetensors", 16, 64)
    settings = {**to, "calibrate": tokens, "heal_steps": healed, "heal_batch_tokens": 256}
    fold(source, tmp_path / "whole", max_shard_size="100KB", device="cpu", **settings)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()] + ["--max-shard-size=100KB", "--device=cpu"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kvfold", "convert", str(source), str(out), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.time() + 120
    while not (journal.exists() and journal.read_text().count("unit") >= 1):
        assert process.poll() is None and time.time() < deadline, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    finished = journal.read_text().count('"unit"')
    assert finished >= 1
    convert(str(source), out, ConvertSettings(device="cpu", max_shard_size="100KB", **settings), resume=True)
    assert _weights(out) == _weights(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def _weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "kvfold.json"}
