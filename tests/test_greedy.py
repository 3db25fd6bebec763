"""Greedy answers: what one forward pass says of them is what generating says, and the report has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.evaluation import greedy
from tests.helpers import invoke, save_model, save_tokenizer, save_tokens

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<answer>"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose tokenizer has a chat template, and one a little beside it."""
    folder = tmp_path_factory.mktemp("greedy")
    source = save_model(folder / "source", "llama", vocab_size=258)
    tokenizer = save_tokenizer(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.004 * torch.randn_like(parameter))
    model.save_pretrained(folder / "near")
    return source, folder / "near"


def windows(rows: int, length: int) -> torch.Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(3))


def generated(model: Any, prompt: torch.Tensor, eos: int | None) -> list[int]:
    """What transformers continues a prompt with, greedily, by 16 tokens at most."""
    model.generation_config = GenerationConfig(eos_token_id=eos)
    plain = GenerationConfig(do_sample=False, max_new_tokens=16, eos_token_id=eos, pad_token_id=0)
    ids = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], generation_config=plain)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("ends", [False, True])
def test_leaving_is_where_two_generations_part(pair: tuple[Path, Path], ends: bool) -> None:
    source, near = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in pair)
    rows, grid = windows(24, 40), greedy.GreedyGrid(20, 16)
    eos = None
    if ends:  # a token that many answers have
        answers = greedy.ask(source, pair[0], rows, grid, 8)
        assert answers is not None
        eos = int(torch.cat([a for _, a in answers.batches["text"]]).flatten().mode().values)
    source.generation_config = GenerationConfig(eos_token_id=eos, repetition_penalty=3.0)  # which greedy is not to obey
    answers = greedy.ask(source, pair[0], rows, grid, 8)
    assert answers is not None and [len(a) for _, a in answers.batches["text"]] == [8, 8, 4]
    found = greedy.compare(near, answers)

    for kind in ("text", "chat"):
        agreed, lengths = [], []
        for prompts, answer in answers.batches[kind]:
            for prompt, whole in zip(prompts, answer.tolist(), strict=True):
                said = [generated(model, prompt, eos) for model in (source, near)]
                assert said[0] == whole[: len(said[0])]
                same = [a == b for a, b in zip(*said, strict=False)]
                agreed.append(same.index(False) if False in same else len(same))
                lengths.append(len(said[0]))
        never = [a == b for a, b in zip(agreed, lengths, strict=True)]
        assert 0 < sum(never) < 20 and (min(lengths) < 16) == ends
        got = found[kind]
        assert got["mean"] == pytest.approx(sum(agreed) / 20)
        assert got["median"] == sum(sorted(agreed)[9:11]) / 2
        assert got["never_leaves"] == sum(never) / 20
        assert got["answer_tokens"] == pytest.approx(sum(lengths) / 20)
        still = [sum(a >= n or over for a, over in zip(agreed, never, strict=True)) / 20 for n in range(1, 17)]
        assert got["still"] == pytest.approx(still)
    assert greedy.compare(source, answers)["text"]["never_leaves"] == 1.0


def test_a_chat_prompt_is_the_passage_in_the_template(pair: tuple[Path, Path]) -> None:
    source = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    tokenizer = save_tokenizer(pair[0].parent / "plain")
    text = "Once upon a time there was a fox"
    ids = torch.tensor(tokenizer(2 * text)["input_ids"])[None]
    answers = greedy.ask(source, pair[0], ids, greedy.GreedyGrid(4, 8), 4)
    assert answers is not None
    assert tokenizer.decode(answers.batches["text"][0][0][0]) == text
    assert tokenizer.decode(answers.batches["chat"][0][0][0]) == f"<user>{text}</user><answer>"
    assert greedy.chat_template(pair[0].parent / "plain") is None
    assert greedy.chat_template(pair[1]) is None  # no tokenizer
    # the answer fits behind the prompt, and the prompt in front of it: 128 positions
    long = greedy.ask(source, pair[0], windows(2, 128), greedy.GreedyGrid(2, 100), 2)
    assert long is not None and long.tokens == 64
    assert {kind: b[0][0].shape[1] for kind, b in long.batches.items()} == {"text": 64, "chat": 64}
    tight = greedy.ask(source, pair[0], windows(2, 120), greedy.GreedyGrid(2, 60), 2)
    assert tight is not None and tight.batches["chat"][0][0].shape[1] == 128 - 60


def test_the_report_has_them_beside_the_floor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert(str(pair[0]), tmp_path / "gqa", ConvertSettings(to="gqa", kv_heads=4))
    tokens = save_tokens(tmp_path / "t.safetensors", 12, 48, 256)
    args: tuple[Any, ...] = ("evaluate", tmp_path / "gqa", "--on", tokens, "--quick", "--report", tmp_path / "r")
    assert invoke(*args)[0] == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    floor, found = report["source"]["greedy"], report["models"][0]["greedy"]
    assert (floor["dtype"], found["dtype"], floor["tokens"]) == ("bfloat16", "float32", 32)
    for kind in ("text", "chat"):
        assert floor[kind]["prompts"] == 8 and floor[kind]["mean"] > found[kind]["mean"]
        assert floor[kind]["never_leaves"] == floor[kind]["still"][-1]
    text = (tmp_path / "r" / "report.md").read_text()
    assert "## Greedy answers" in text and "| source, bfloat16 |" in text and "chat: never leaves" in text


def test_windows_beyond_the_positions_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    convert(str(pair[0]), tmp_path / "gqa", ConvertSettings(to="gqa", kv_heads=4))
    (tmp_path / "a.txt").write_text("some text. " * 60)
    args = ("evaluate", tmp_path / "gqa", "--damage-only", "--report", tmp_path / "r", "--on")
    code, message = invoke(*args, tmp_path / "a.txt", "--window", 129)
    assert code == 2
    assert message == "kvfold: --window 129 exceeds the 128 positions that the source knows: give --window 128\n"
    code, message = invoke(*args, tokens := save_tokens(tmp_path / "t.safetensors", 4, 130, 256))
    assert code == 2
    wanted = f"{tokens} has rows of 130 ids, which exceeds the 128 positions that the source knows: give rows of 128 or fewer"
    assert message == f"kvfold: {wanted}\n"
    assert invoke(*args, tmp_path / "a.txt", "--window", 128)[0] == 0
