"""Serving without vLLM: latents in pages give what the same designs give on whole sequences, and what is refused."""

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvfold.serving.checks import SERVED, ServedConfig, obstacle
from kvfold.serving.paged import AT_ONCE, Layer, Step
from kvfold.serving.ranks import local, share, unsplit
from kvfold.surgery.kvfold_attention import DESIGNS, FoldedAttention, Rope
from tests.helpers import tiny_config

HIDDEN, HEADS, WIDTH, PAGE = 24, 4, 8, 4
NORM = {"kv_heads": 2, "together": False, "eps": 1e-6}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mla": ("latent", {"rank": 10, "rope_dim": 4, "nope_dim": 6}),
    "mla, low-rank queries": ("latent", {"rank": 10, "rope_dim": 4, "nope_dim": 6, "q_rank": 5, "query_bias": True}),
    "mla behind a norm": ("latent", {"rank": 10, "rope_dim": 4, "nope_dim": 6, "norm": NORM}),
    "mla with turned keys": ("latent", {"rank": 10, "rope_dim": 4, "nope_dim": 8, "turned": 3}),
    "mfa": ("latent", {"rank": 6, "rope_dim": 10, "nope_dim": 0}),
    "mfa-kr": ("reused-key", {"rope_dim": 10}),
    "mfa-kr behind a norm": ("reused-key", {"rope_dim": 10, "norm": NORM}),
    "rebuilt keys": ("rebuilt-key", {"rank": 10, "kv_heads": 2}),
    "rebuilt keys behind a norm": ("rebuilt-key", {"rank": 10, "kv_heads": 2, "norm": NORM}),
}


class Rotary(torch.nn.Module):
    """As transformers' rotary modules are called."""

    def forward(self, x: Tensor, positions: Tensor) -> Rope:
        angles = positions[..., None] * 0.7 ** torch.arange(WIDTH // 2)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def attention(shape: str) -> FoldedAttention:
    name, widths = SHAPES[shape]
    torch.manual_seed(0)
    made = DESIGNS[name](HIDDEN, heads=HEADS, value_dim=WIDTH, **widths).requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=0.4)
    if "rope_dim" in widths:
        made.rope_pairs[-1] = WIDTH // 2  # does not turn
    made.rotary_emb = Rotary()
    return made


def whole(made: FoldedAttention, x: Tensor, window: int | None) -> Tensor:
    """One request (S, d) at once and without a cache."""
    positions = torch.arange(len(x))
    distance = positions[:, None] - positions
    mask = (distance >= 0) & (distance < (window or len(x)))
    return made.mix(x[None], made.rotary_emb(x, positions[None]), mask[None, None])[0]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_of_several_requests_give_what_whole_sequences_give(shape: str, window: int | None) -> None:
    """Prompts in pieces beside requests that decode; one begins with pages that another fills in the same step."""
    made = attention(shape)
    layer = Layer(made, window)
    generator = torch.Generator().manual_seed(1)
    requests = [torch.randn(length, HIDDEN, generator=generator) for length in (11, 19, 14, 9)]
    requests[3][:PAGE] = requests[0][:PAGE]
    table = torch.tensor([[7, 2, 9, 0, 0], [4, 8, 1, 3, 5], [6, 10, 11, 12, 0], [7, 13, 14, 0, 0]])
    pages = torch.full(
        (15, PAGE, made.states(requests[0][None], made.rotary_emb(HIDDEN, torch.arange(11)[None])).shape[-1]), 1e4
    )
    steps = [
        {3: (4, 7), 0: (0, 6), 1: (0, 3)},  # the last request's first page is the first one's
        {0: (6, 7), 1: (3, 12), 3: (7, 8), 2: (0, 14)},
        {3: (8, 9), 1: (12, 19), 0: (7, 8)},
        *({0: (at, at + 1)} for at in (8, 9, 10)),
    ]
    found = [torch.zeros(len(x), HEADS * WIDTH) for x in requests]
    for step in steps:
        starts = [0]
        for first, last in step.values():
            starts.append(starts[-1] + last - first)
        at = [torch.arange(first, last) for first, last in step.values()]
        x = torch.cat([requests[r][p] for r, p in zip(step, at, strict=True)])
        slots = torch.cat([table[r, p // PAGE] * PAGE + p % PAGE for r, p in zip(step, at, strict=True)])
        made_step = Step(starts, [last for _, last in step.values()], table[list(step)], slots)
        out = layer.attend(x, made.rotary_emb(x, torch.cat(at)), pages, made_step)
        for number, (r, p) in enumerate(zip(step, at, strict=True)):
            found[r][p] = out[starts[number] : starts[number + 1]]
    for request, (x, got) in enumerate(zip(requests, found, strict=True)):
        first = PAGE if request == 3 else 0
        torch.testing.assert_close(got[first:], whole(made, x, window)[first:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ranks_outputs_add_up(shape: str) -> None:
    made, (name, widths), ranks = attention(shape), SHAPES[shape], 2
    x = torch.randn(1, 7, HIDDEN, generator=torch.Generator().manual_seed(2))
    rope, total = made.rotary_emb(x, torch.arange(7)[None]), torch.zeros_like(x)
    for rank in range(ranks):
        part = DESIGNS[name](HIDDEN, **local({"heads": HEADS, "value_dim": WIDTH, **widths}, ranks))
        part.load_state_dict({n: share(n, t, rank, ranks) for n, t in made.state_dict().items() if "rotary" not in n})
        part.rotary_emb = made.rotary_emb
        with torch.no_grad():
            total += part(x, rope)[0]
    torch.testing.assert_close(total, made(x, rope)[0], atol=2e-5, rtol=1e-4)


def test_requests_that_decode_attend_together_within_bounds() -> None:
    lengths = [AT_ONCE // 2, 3, AT_ONCE, 40, AT_ONCE // 2 - 1]
    step = Step([0, 1, 2, 3, 43, 44], lengths, torch.zeros(5, AT_ONCE, dtype=torch.int32), torch.zeros(44))
    groups = [sorted(group.new[:, 0].tolist()) for group in step.together(1, None)]
    assert groups == [[3], [1, 43], [0], [2]]
    assert [group.pages.shape for group in step.together(1, 5)] == [(1, 40), (4, 5)]


LAYER = {"design": "latent", "rank": 20, "rope_dim": 12, "nope_dim": 8, "heads": 8, "value_dim": 8}


@pytest.mark.parametrize(
    ("changes", "version", "message"),
    [
        ({}, "0.32.1", None),
        ({}, "0.31.0", "kvfold serves with vLLM 0.32, and this is 0.31.0"),
        (
            {"source_model_type": "gemma"},
            "0.32.0",
            "cannot serve gemma in vLLM, only llama, mistral, qwen2, qwen3, mixtral, qwen3_moe",
        ),
        ({"folded_layers": None, "attention_design": "latent"}, "0.32.0", "convert the source again"),
        ({"folded_layers": [{"design": "another"}, None]}, "0.32.0", "convert the source again"),
        ({"folded_layers": [{**LAYER, "depth": 2}, None]}, "0.32.0", "folded_layers[0].depth is nothing that latent takes"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "0.32.0", "type dynamic in vLLM, only default, linear, llama3, yarn"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(changes: dict[str, Any], version: str, message: str | None) -> None:
    said = {"source_model_type": "llama", "num_hidden_layers": 2, "folded_layers": [LAYER, None]}
    reason = obstacle({**said, **changes}, version)
    assert reason is None if message is None else message in str(reason)
    assert "\n" not in str(reason)


def test_ranks_must_divide_the_heads() -> None:
    assert unsplit([{"heads": 8}, None], 4) is None
    assert unsplit([{"heads": 6}], 4) == "--tensor-parallel-size 4 does not divide 6 query heads; 1, 2, 3, 6 do"
    normed = [{"heads": 8, "norm": {"kv_heads": 2}}]
    assert unsplit(normed, 2) is None
    assert unsplit(normed, 4) == "--tensor-parallel-size 4 does not divide 2 key heads; 1, 2 do"


def test_a_served_config_names_the_class_of_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        **tiny_config("qwen3").to_dict(),
        "model_type": "kvfold",
        "source_model_type": "qwen3",
        "folded_layers": [None, None],
    }
    monkeypatch.setattr("kvfold.serving.checks.installed", lambda: "0.32.0")
    config = ServedConfig.from_dict(said)
    assert config.architectures == ["KvfoldQwen3ForCausalLM"]
    sent = pickle.loads(pickle.dumps(config))  # to vLLM's other processes
    assert type(sent) is type(config) and sent.to_dict() == config.to_dict()
    monkeypatch.setattr("kvfold.serving.checks.installed", lambda: "0.40.0")
    with pytest.raises(ValueError, match="this is 0.40.0"):
        ServedConfig.from_dict(said)


def test_served_families_have_the_names_of_transformers() -> None:
    for family, architecture in SERVED.items():
        assert AutoModelForCausalLM._model_mapping[type(tiny_config(family))].__name__ == architecture


def test_the_plugin_imports_little() -> None:
    code = "import sys, kvfold.serving.checks, kvfold.serving.paged; print([m for m in sys.modules if m.startswith('kvfold.')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(eval(ran.stdout)) == {
        *("kvfold.errors", "kvfold.convert", "kvfold.convert.layouts", "kvfold.convert.layouts.modeling_kvfold"),
        *(
            "kvfold.surgery",
            "kvfold.surgery.kvfold_attention",
            "kvfold.serving",
            "kvfold.serving.checks",
            "kvfold.serving.latents",
            "kvfold.serving.paged",
            "kvfold.serving.selfcheck",
        ),
    }
