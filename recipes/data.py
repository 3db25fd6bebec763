"""What uptraining reads: windows of tokens on disk, in an order that the seed alone decides."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kvfold.convert.output.files import files_under, stamp
from kvfold.convert.source.data import (
    documents,
    encode,
    load_tokenizer,
    load_windows,
    refuse_foreign_ids,
    several,
    token_rows,
)
from kvfold.errors import UserError
from kvfold.recipes.recipe import Recipe


def pack(origins: list[str], tokenizer_folder: Path, recipe: Recipe, vocab_size: int, folder: Path) -> None:
    """Cut texts into windows and keep these in `folder` as a dataset of `input_ids`.

    The texts are streamed and the windows memory-mapped, so neither has to fit into memory. From each text come at
    most as many tokens as the recipe trains on.

    Args:
        origins: texts as `--calibrate` of convert takes them, self apart.

    Raises:
        UserError: nothing there, unreadable, not one window, windows of different length, or ids outside the vocabulary.
    """
    import datasets

    datasets.disable_progress_bars()
    cache = folder.with_name(folder.name + ".cache")
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    length = [0]

    def windows() -> Iterator[dict[str, Any]]:
        for origin in origins:
            rows = _windows(origin, tokenizer_folder, recipe.window, recipe.tokens)
            for row in rows:
                refuse_foreign_ids(origin, min(row), max(row), vocab_size)
                length[0] = length[0] or len(row)
                if len(row) != length[0]:
                    raise UserError(
                        f"{origin} has windows of {len(row)} ids and the text before it of {length[0]}: give window={len(row)}"
                    )
                yield {"input_ids": row}

    try:
        datasets.Dataset.from_generator(windows, features=features, cache_dir=str(cache)).save_to_disk(str(folder))
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        known = isinstance(cause, (UserError, OSError))
        raise (cause if known else UserError(f"--data {','.join(origins)} cannot be read: {cause}")) from None
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def stamps(origins: str) -> dict[str, str]:
    """What tells whether texts that lie here are still the same: sizes and times of the files of each."""
    found = {}
    for origin in several(origins, "--data"):
        path = Path(origin.rpartition(":")[0] if ".safetensors:" in origin else origin)
        if path.is_file():
            found[origin] = stamp(path)
        elif path.is_dir():
            found[origin] = hashlib.sha256(repr([(str(p), stamp(p)) for p in files_under(path)]).encode()).hexdigest()
    return found


def _windows(origin: str, tokenizer_folder: Path, window: int, tokens: int) -> Iterator[list[int]]:
    """The windows of one text: as many as hold `tokens`, cut without overlap from its documents one after the other."""
    if ".safetensors" in origin:
        yield from token_rows(origin, tokens).tolist()
        return
    tokenizer = load_tokenizer(tokenizer_folder)
    left, ids = max(1, tokens // window), []
    for text in documents(origin):
        # A very long document is encoded in pieces, so that its ids need not all be in memory; a window that spans two
        # pieces may then hold one split word.
        for start in range(0, len(text) if text.strip() else 0, PIECE):
            ids += encode(tokenizer, text[start : start + PIECE], special=start == 0)
            while len(ids) >= window and left:
                yield ids[:window]
                ids, left = ids[window:], left - 1
            if not left:
                return
    if left == max(1, tokens // window):
        raise UserError(f"{origin} gives {len(ids)} tokens, fewer than one window of {window}: give more text, or window=N")


PIECE = 1 << 20
"""Characters of a document that are encoded at a time."""


MOST_WINDOWS = 10**7


class Windows(Dataset):
    """Token windows in a given order; an item is `{"input_ids": (T,) int64}`."""

    def __init__(self, rows: Any, order: list[int]) -> None:
        self.rows, self.order = rows.with_format("torch"), order
        self.window = len(rows[0]["input_ids"])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[self.order[index]]["input_ids"].long()}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([item["input_ids"] for item in items])}


def training_order(windows: list[int], steps: int, batch: int, seed: int) -> list[int]:
    """`steps · batch` of these windows: every pass over them in an order of its own.

    Raises UserError for more than `MOST_WINDOWS`, whose order alone would fill the memory.
    """
    if steps * batch > MOST_WINDOWS:
        raise UserError(
            f"{steps:,} steps of {batch:,} windows are {steps * batch:,} windows, and {MOST_WINDOWS:,} are the most: give "
            "fewer tokens, longer windows or a smaller batch"
        )
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    while len(order) < steps * batch:
        order += [windows[i] for i in torch.randperm(len(windows), generator=generator).tolist()]
    return order[: steps * batch]


def split_off(count: int, held: int, seed: int) -> tuple[list[int], list[int]]:
    """Window numbers for training and `held` others to evaluate on.

    Raises UserError when too few are left to train on.
    """
    if held >= count:
        raise UserError(
            f"--data gives {count} windows and {held} of them would be held out: give more text, a text to --eval, "
            "or a smaller eval_tokens"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held:]), sorted(order[:held])


def evaluation_windows(
    origin: str | None, rows: Any, recipe: Recipe, tokenizer_folder: Path, vocab_size: int, processes: int
) -> tuple[list[int], Tensor]:
    """Numbers of the windows to train on, and the held-out windows (n, T), as many for each process.

    Raises:
        UserError: as `load_windows` and `split_off`, and when there are fewer held-out windows than processes.
    """
    if origin is None:
        length = len(rows[0]["input_ids"])
        held = min(recipe.eval_tokens // length, len(rows) // 10) // processes * processes
        training, held_out = split_off(len(rows), max(processes, held), recipe.seed)
        return training, torch.tensor(rows[held_out]["input_ids"])
    ids = load_windows(origin, tokenizer_folder, recipe.window, recipe.eval_tokens, vocab_size).ids
    if len(ids) < processes:
        raise UserError(f"--eval {origin} has {len(ids)} windows for {processes} processes: give more text")
    return list(range(len(rows))), ids[: len(ids) // processes * processes]
