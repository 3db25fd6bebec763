"""Greedy answers: how long does a folded model say what its source says?

The source continues the beginnings of held-out windows greedily; for a model that chats also the same passages as a user's
turn in its template. A model's own greedy answer leaves the source's at the first token where its most likely one is
another. Until there both have read the same, so one forward pass over the source's answer finds that token. The floor is the
source itself in another dtype, for rounding alone changes answers too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.convert.processes import spread
from kvfold.convert.source.data import load_tokenizer
from kvfold.errors import UserError
from kvfold.evaluation.damage import interval

PROMPT = 128
"""Tokens of a window that are continued, half of it at most."""
MARK = "kvfold-passage"


@dataclass(frozen=True)
class GreedyGrid:
    """How many windows are continued, and by how many tokens at most."""

    prompts: int
    tokens: int


GRIDS = {"quick": GreedyGrid(8, 32), "normal": GreedyGrid(32, 64), "full": GreedyGrid(128, 128)}


@dataclass(frozen=True)
class Answers:
    """What the source answered, for `compare`.

    Attributes:
        tokens: the most that an answer may have.
        batches: for `text`, and `chat` where there is a template, prompts (n, P) and answers (n, N), on the CPU.
        ends: ids behind which an answer is over.
    """

    tokens: int
    batches: dict[str, list[tuple[Tensor, Tensor]]]
    ends: tuple[int, ...]


def ask(source: PreTrainedModel, folder: Path, windows: Tensor, grid: GreedyGrid, batch: int) -> Answers | None:
    """Let the source answer the beginnings of `windows` (rows, T); `folder` has its tokenizer.

    None when the windows are too short to begin with, or the model's positions end behind them.
    """
    limit = position_limit(source.config) or windows.shape[1] + grid.tokens
    prompts = windows[: grid.prompts, : min(PROMPT, windows.shape[1] // 2)]
    tokens = min(grid.tokens, limit - prompts.shape[1])
    if tokens < 1:
        return None
    asked = {"text": prompts}
    if (template := chat_template(folder)) is not None:
        room = limit - tokens - sum(map(len, template))
        if room >= 1:
            before, after = (torch.tensor(ids, dtype=torch.long).expand(len(prompts), -1) for ids in template)
            asked["chat"] = torch.cat([before, prompts[:, :room], after], 1)
    batches = {
        kind: spread(rows.split(batch), lambda _, ids: (ids, answer(source, ids, tokens))) for kind, rows in asked.items()
    }
    ends = getattr(source.generation_config, "eos_token_id", None)
    return Answers(tokens, batches, tuple(ends if isinstance(ends, list) else [] if ends is None else [ends]))


def position_limit(config: Any) -> int | None:
    """How many positions a model knows, None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def chat_template(folder: Path) -> tuple[list[int], list[int]] | None:
    """Token ids before and behind a user's first turn and up to where the answer begins; None without such a template.

    A passage of ids between them is read as it stands, so that all prompts stay equally long.
    """
    try:
        tokenizer: Any = load_tokenizer(folder)
    except UserError:  # the text is tokens
        return None
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        turns = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError):  # it wants more than one turn of a user
        return None
    before, found, after = text.partition(MARK)
    if not found:
        return None
    first, last = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    return first, last


@torch.no_grad()
def answer(model: PreTrainedModel, prompts: Tensor, tokens: int) -> Tensor:
    """The most likely token, `tokens` times: (n, P) → (n, tokens) on the CPU, ends of text included.

    Not `generate`, which obeys what generation_config.json says of repetition penalties and the like.
    """
    ids, cache, found = prompts.to(model.device), None, []
    for _ in range(tokens):
        out = model.base_model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, _most_likely(model, out.last_hidden_state[:, -1:])
        found.append(ids)
    return torch.cat(found, 1).cpu()


@torch.no_grad()
def compare(model: PreTrainedModel, answers: Answers) -> dict[str, Any]:
    """How long a model's own greedy answers follow `answers`, as `schema.Greedy` has it."""

    def follow(_: int, pair: tuple[Tensor, Tensor]) -> list[tuple[int, int]]:
        prompts, wanted = pair
        ids = torch.cat([prompts, wanted[:, :-1]], 1).to(model.device)
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, prompts.shape[1] - 1 :]
        same = (_most_likely(model, hidden).cpu() == wanted).long().cumprod(1).sum(1)
        lengths = [_length(row, answers.ends) for row in wanted.tolist()]
        return [(min(agreed, length), length) for agreed, length in zip(same.tolist(), lengths, strict=True)]

    followed = {kind: list(chain(*spread(batches, follow))) for kind, batches in answers.batches.items()}
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": answers.tokens,
        "text": _agreement(followed["text"], answers, "text"),
        "chat": _agreement(followed["chat"], answers, "chat") if "chat" in followed else None,
    }


def _most_likely(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(n, T, d) → (n, T), a row at a time, for the logits of all may not fit into memory."""
    return torch.stack([model.get_output_embeddings()(row).argmax(-1) for row in hidden])


def _length(row: list[int], ends: Sequence[int]) -> int:
    """Tokens of an answer, the one that ends it included."""
    return next((number for number, token in enumerate(row, 1) if token in ends), len(row))


def _agreement(followed: list[tuple[int, int]], answers: Answers, kind: str) -> dict[str, Any]:
    """Of pairs of tokens agreed upon and tokens answered."""
    agreed = [tokens for tokens, _ in followed]
    left = [tokens if tokens < length else answers.tokens + 1 for tokens, length in followed]
    return {
        "prompts": len(agreed),
        "prompt_tokens": answers.batches[kind][0][0].shape[1],
        "answer_tokens": mean(length for _, length in followed),
        "mean": mean(agreed),
        "mean_interval": interval(torch.tensor(agreed)[:, None]),
        "median": median(agreed),
        "never_leaves": mean(tokens == length for tokens, length in followed),
        "still": [mean(at >= number for at in left) for number in range(1, answers.tokens + 1)],
    }
