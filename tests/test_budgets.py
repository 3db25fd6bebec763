"""Widths per layer: the best under a total, and a conversion that has them."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kvfold.convert.budgets import Curve, alike, allocate
from kvfold.convert.pipeline import convert
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.planning.widths import widths_to_try
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.surgery import latent
from tests.helpers import save_model, save_tokens
from tests.test_convert import decoded_as_uncached, fold, load


def test_the_allocation_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    curves: list[Curve] = [
        {n: (float(torch.rand((), generator=generator)) / n, (n - 2, 2)) for n in (4, 6, 10, 16)} for _ in range(5)
    ]
    best = allocate(curves, 40)
    every = [
        (sum(curve[n][0] for curve, n in zip(curves, chosen, strict=True)), chosen)
        for chosen in itertools.product((4, 6, 10, 16), repeat=5)
        if sum(chosen) <= 40
    ]
    assert tuple(map(sum, best)) == min(every)[1]
    with pytest.raises(ValueError, match="no widths of 5 layers sum to 19 or less"):
        allocate(curves, 19)


@pytest.mark.parametrize(
    "settings",
    [
        {"to": "mla", "kv_budget": "25%"},
        {"to": "mla", "kv_rank": 16, "keys": "rebuilt"},
        {"to": "mfa", "width": 12},
        {"to": "mfa-kr", "width": 16},
    ],
)
def test_measured_widths_keep_the_total_and_lose_less(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=3)
    shape = {**settings, "calibrate": save_tokens(tmp_path / "t.safetensors", 16, 40)}
    uniform = fold(source, tmp_path / "uniform", **{"layout": "kvfold", **shape})
    measured = fold(source, tmp_path / "measured", **shape, layer_budgets="measured")
    widths = measured["target"]["widths"]
    assert len({sum(pair) for pair in widths}) > 1
    assert measured["cache_numbers_per_token_per_layer"] <= uniform["cache_numbers_per_token_per_layer"]
    lost = [sum(layer["block_error"] for layer in record["layers"]) for record in (uniform, measured)]
    assert lost[1] < lost[0]
    model = load(tmp_path / "measured")
    cache = decoded_as_uncached(model)
    assert [layer.keys.shape[-1] for layer in cache.layers] == [sum(pair) for pair in widths]
    plan = make_plan(CheckpointReader(source).config, ConvertSettings(**shape, layer_budgets="measured"))
    assert all(sum(pair) >= 4 for pair in widths_to_try(plan))
    assert not list(tmp_path.glob("*.hidden"))


def test_a_budget_is_split_by_what_each_layer_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all splits of the same cache each layer takes one that loses no more than the plan's."""
    monkeypatch.setattr(latent, "FREE", {})  # what comes behind the split may tip the scales
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=3)
    shape = {"to": "mla", "layout": "kvfold", "calibrate": save_tokens(tmp_path / "t.safetensors", 16, 40)}
    plan = make_plan(CheckpointReader(source).config, ConvertSettings(**shape, kv_budget="25%"))
    assert plan.measures_widths and "widths are measured" in plan.note
    assert plan.kv_rank + plan.rope_dim == plan.cache_numbers
    assert {sum(pair) for pair in widths_to_try(plan)} == {plan.cache_numbers}
    measured = fold(source, tmp_path / "measured", **shape, kv_budget="25%")
    planned = fold(source, tmp_path / "planned", **shape, kv_rank=plan.kv_rank, rope_dim=plan.rope_dim)
    assert measured["cache_numbers_per_token_per_layer"] == planned["cache_numbers_per_token_per_layer"]
    assert all(sum(pair) == plan.cache_numbers for pair in measured["target"]["widths"])
    assert any(tuple(pair) != (plan.kv_rank, plan.rope_dim) for pair in measured["target"]["widths"])
    pairs = zip(measured["layers"], planned["layers"], strict=True)
    assert all(ours["block_error"] <= theirs["block_error"] for ours, theirs in pairs)
    decoded_as_uncached(load(tmp_path / "measured"))
    for fixed in ({"kv_budget": "25%", "rope_dim": 8}, {"kv_rank": 8}, {"kv_budget": "50%", "method": "svd-joint"}):
        assert not make_plan(CheckpointReader(source).config, ConvertSettings(**shape, **fixed)).measures_widths


def test_resumed_with_measured_widths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted behind the first layer: the widths are measured again, and the files are those of a whole run."""
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=3)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    settings = ConvertSettings(
        to="mfa-kr", width=16, layer_budgets="measured", calibrate=tokens, heal_steps=3, heal_window=2, heal_batch_tokens=80
    )
    convert(str(source), tmp_path / "whole", settings)

    from kvfold.convert import heal_windows

    real = heal_windows._heal

    def stops(*args: Any) -> dict[str, float]:
        if args[1] == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(heal_windows, "_heal", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "out", settings)
    monkeypatch.setattr(heal_windows, "_heal", real)
    assert json.loads((tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()[-1])["unit"] == "layer 0"
    convert(str(source), tmp_path / "out", settings, resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_layers_that_must_be_alike_get_the_split_of_least_summed_error(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=3)
    shape = {"to": "mla", "calibrate": save_tokens(tmp_path / "t.safetensors", 16, 40), "heal_steps": 0}
    plan = make_plan(CheckpointReader(source).config, ConvertSettings(**shape, kv_budget="25%"))
    assert plan.layout == "deepseek_v3" and plan.measures_widths
    splits = widths_to_try(plan)
    assert (plan.kv_rank, plan.rope_dim) in splits and all(rope <= plan.rope_dim for _, rope in splits)
    measured = fold(source, tmp_path / "measured", **shape, kv_budget="25%")
    config = AutoConfig.from_pretrained(tmp_path / "measured")
    chosen = (measured["target"]["kv_rank"], measured["target"]["rope_dim"])
    assert chosen in splits and sum(chosen) == plan.cache_numbers == measured["cache_numbers_per_token_per_layer"]
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == chosen
    decoded_as_uncached(load(tmp_path / "measured"))
    assert alike([{(3, 1): 0.5, (2, 2): 0.1}, {(3, 1): 0.1, (2, 2): 0.2}]) == (2, 2)
