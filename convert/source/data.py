"""Text and tokens: what calibration, healing and evaluation read, cut into windows of equal length."""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfold.convert import processes
from kvfold.convert.source.configfile import read_config
from kvfold.convert.source.jsonfile import read_json
from kvfold.convert.source.model import load_causal, refuse_code
from kvfold.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvfold.convert.families import AttentionSpec
    from kvfold.convert.planning.conversion_plan import ConversionPlan

SAMPLING_CACHE = 4 << 30
"""Bytes that the cache of a source may take on a GPU while it writes."""
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Windows:
    """Token windows.

    Attributes:
        ids: (n, window) int64.
        bytes_per_token: UTF-8 bytes of the text behind one token, None when no tokenizer could tell.
        origin: where they come from, as the user wrote it.
        more: (m, window) int64, what follows in a calibration text; None for text that nothing more is read of.
    """

    ids: Tensor
    bytes_per_token: float | None
    origin: str
    more: Tensor | None = None

    @property
    def all(self) -> Tensor:
        """All ids (n + m, window)."""
        return self.ids if self.more is None else torch.cat([self.ids, self.more])


def load_windows(
    origin: str, tokenizer_folder: Path, window: int, max_tokens: int, vocab_size: int | None = None, overlap: int = 0
) -> Windows:
    """Cut a text, a dataset or a token file into windows.

    Args:
        origin: a .txt/.md/.py/.jsonl/.json/.parquet file, a folder of such, a Hub dataset `name[:config[:split[:column]]]`,
            or `file.safetensors:name`, an integer tensor (rows, length) whose rows are the windows as they are.
        tokenizer_folder: checkpoint whose tokenizer encodes the text, special tokens as it adds them to each document.
        window: tokens per window; text is concatenated over documents before it is cut.
        max_tokens: windows are taken from the beginning until they hold this many tokens.
        vocab_size: ids must lie below it.
        overlap: tokens of text that a window shares with the one before; with 1, every token but the text's first is
            predicted once.

    Raises:
        UserError: nothing there, unreadable, empty, shorter than one window, or ids outside the vocabulary.
    """
    from_tokens = ".safetensors" in origin
    try:
        tokenizer = load_tokenizer(tokenizer_folder)
    except UserError:
        if not from_tokens:
            raise
        tokenizer = None  # tokens from a file need none
    ids = token_rows(origin, max_tokens) if from_tokens else _encode(origin, tokenizer, window, max_tokens, overlap)
    refuse_foreign_ids(origin, int(ids.min()), int(ids.max()), vocab_size)
    size = None if tokenizer is None else _bytes_per_token(ids, tokenizer)
    return Windows(ids, size or None, origin)  # a tokenizer that loads without its files knows no text


def refuse_foreign_ids(origin: str, least: int, most: int, vocab_size: int | None) -> None:
    """Raise UserError when a text's least or greatest token id is none of the model's."""
    for id_ in (least, most):
        if id_ < 0 or (vocab_size is not None and id_ >= vocab_size):
            raise UserError(
                f"{origin} holds token id {id_}, outside the model's vocabulary of {vocab_size}: "
                "encode the text with the source's own tokenizer"
            )


def calibration_windows(
    plan: "ConversionPlan", folder: Path, device: torch.device, report: Callable[[str], None]
) -> Windows | None:
    """The windows that `--calibrate` names, and more of its texts where healing has steps for more; None when it names none.

    Raises UserError as `load_windows` does.
    """
    settings = plan.settings
    if settings.calibrate is None:
        return None
    origins = several(settings.calibrate, "--calibrate")
    tokens = settings.calibration_tokens // len(origins)
    if len(origins) > 1 and tokens < settings.window:
        raise UserError(
            f"--calibration-tokens {settings.calibration_tokens} are less than a --window of {settings.window} for each of "
            f"{len(origins)} texts: take more tokens"
        )
    more = settings.more_tokens // len(origins)
    windows = mixed([_calibration_windows(plan, origin, tokens, more, folder, device, report) for origin in origins])
    if windows.ids.shape[1] > plan.spec.max_positions:
        raise UserError(
            f"{settings.calibrate} has rows of {windows.ids.shape[1]} ids; the source knows {plan.spec.max_positions} positions"
        )
    return windows


def _calibration_windows(
    plan: "ConversionPlan",
    origin: str,
    tokens: int,
    more: int,
    folder: Path,
    device: torch.device,
    report: Callable[[str], None],
) -> Windows:
    """The windows of one text: at most so many tokens, and at most so many more of it for healing."""
    settings = plan.settings
    if (own := own_tokens(origin, "--calibrate", settings.window, tokens)) is not None:
        at_once = sampled_at_once(plan.spec, settings.window, device)
        wanted = settings.window, own, device, settings.seed, at_once
        return processes.from_main(lambda: sample_from_source(folder, *wanted, report))
    report("reading calibration text")
    read = load_windows(origin, folder, settings.window, tokens + more, plan.spec.vocab_size)
    count = max(1, tokens // read.ids.shape[1])
    return replace(read, ids=read.ids[:count], more=read.ids[count:])


def own_tokens(origin: str, flag: str, window: int, tokens: int) -> int | None:
    """How many tokens the source is to write for a text called self, which means `tokens`, or self:N; None for any other text.

    Raises UserError where they do not fill a window.
    """
    kind, _, count = origin.partition(":")
    if kind != "self":
        return None
    tokens = tokens if not count else int(count) if re.fullmatch("[0-9]{1,15}", count) else 0
    if tokens < window:
        raise UserError(f"{flag} {origin}: write self or self:N, N tokens of at least one --window")
    return tokens


def sampled_at_once(spec: "AttentionSpec", window: int, device: torch.device) -> int:
    """How many windows the source writes side by side: a GPU takes as long for one as for many."""
    cache = 2 * spec.layers * spec.cache_numbers * window  # bytes of a window in half precision
    return 16 if device.type == "cpu" else max(16, min(256, SAMPLING_CACHE // cache))


def several(origins: str, flag: str) -> list[str]:
    """The texts of a setting, with commas between them; a path that has commas is one. Raises UserError for an empty name."""
    listed = [origins] if os.path.exists(origins) else [origin.strip() for origin in origins.split(",")]
    if not all(listed):
        raise UserError(f"{flag} {origins}: name one text, or several separated by single commas")
    return listed


def mixed(parts: list[Windows]) -> Windows:
    """The windows of several texts as those of one, every text spread evenly over it. Raises UserError where they differ in
    length."""
    first, *others = parts
    for other in others:
        if other.ids.shape[1] != first.ids.shape[1]:
            lengths = f"windows of {other.ids.shape[1]} ids and {first.origin} of {first.ids.shape[1]}"
            raise UserError(f"{other.origin} has {lengths}: give texts of one --window")
    more = [part.more for part in parts if part.more is not None]
    return replace(first, ids=_spread([part.ids for part in parts]), more=_spread(more) if more else None)


def _spread(texts: list[Tensor]) -> Tensor:
    """The windows (n, T) of several texts, every one spread evenly over all."""
    places = torch.cat([(torch.arange(len(ids)) + 0.5) / len(ids) for ids in texts])
    return torch.cat(texts)[places.argsort(stable=True)]


def sample_from_source(
    folder: Path, window: int, tokens: int, device: torch.device, seed: int, at_once: int, report: Callable[[str], None]
) -> Windows:
    """Let the source write text, sampled at temperature 1 from its first token on: windows of `window` ids, `at_once` together.

    This one step holds the whole source; accelerate spreads it over the devices, memory and disk there are.
    """
    import tempfile

    from transformers import GenerationConfig, set_seed
    from transformers.utils import logging

    start = _first_token(folder)
    logging.disable_progress_bar()  # ours says more
    with tempfile.TemporaryDirectory() as spill:
        where = "auto" if device.type == "cuda" else str(device)
        loaded: Any = load_causal(folder, dtype="auto", device_map=where, offload_folder=spill)
        model: Any = loaded[0]
        # The checkpoint's own is for chatting: its penalties, beams and stop strings have no place here.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,  # windows are filled to the end: after an end of text the model goes on with the next one
            min_new_tokens=window - 1,
            max_new_tokens=window - 1,
            pad_token_id=start,
        )
        set_seed(seed)
        rows: list[Tensor] = []
        wanted = tokens // window
        while len(rows) < wanted:
            report(f"the source writes text, window {len(rows) + 1}/{wanted}")
            batch = min(at_once, wanted - len(rows))
            begin = torch.full((batch, 1), start, device=model.device)
            # Without a mask of its own generate takes the first token for padding, and nothing attends to it.
            rows += list(model.generate(begin, attention_mask=torch.ones_like(begin)).cpu())
    return Windows(torch.stack(rows), None, "self")


def _first_token(folder: Path) -> int:
    """The id that text begins with: bos, or else eos. Raises UserError when the checkpoint names neither in its vocabulary."""
    config = read_config(folder)
    vocab = config.get("vocab_size")
    for file in ("generation_config.json", "config.json"):
        named = config if file == "config.json" else read_json(folder / file) if (folder / file).exists() else {}
        for key in ("bos_token_id", "eos_token_id"):
            token = named.get(key)
            token = token[0] if isinstance(token, list) and token else token
            if type(token) is int:
                refuse_foreign_ids(f"{folder / file}, {key},", token, token, vocab)
                return token
    raise UserError(f"{folder} names no bos or eos token to begin text with: give --calibrate a text instead")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint, by transformers' own classes. Raises UserError when none loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones
        refuse_code(folder, error, "give tokens as file.safetensors:name")
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} has no tokenizer that loads ({type(error).__name__}: {line}): add its tokenizer files, written by a "
            "version of transformers that is no newer than this one, or give tokens as file.safetensors:name"
        ) from None


def token_rows(origin: str, max_tokens: int) -> Tensor:
    """The rows of `file.safetensors:name`, as many as hold `max_tokens`. Raises UserError as `load_windows` does."""
    from safetensors import SafetensorError, safe_open

    path, _, name = origin.rpartition(":")
    if not path.endswith(".safetensors"):
        path, name = origin, ""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give a token file as file.safetensors:name")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if name not in names:
                raise UserError(f"{path} has no tensor {name!r}: choose one of {', '.join(sorted(names))}, as {path}:NAME")
            rows = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from None
    if rows.ndim != 2 or rows.is_floating_point() or rows.dtype == torch.bool or rows.shape[1] < 2 or not len(rows):
        raise UserError(
            f"{path}:{name} has shape {tuple(rows.shape)} and {rows.dtype}: kvfold needs integer rows of 2 or more ids"
        )
    return rows[: max(1, max_tokens // rows.shape[1])].long()


def _bytes_per_token(ids: Tensor, tokenizer: Any) -> float:
    """Bytes of the text that the predicted tokens (all but each row's first) stand for, over their number."""
    texts = [tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (ids.tolist(), ids[:, :1].tolist())]
    whole, first = (sum(len(text.encode()) for text in batch) for batch in texts)
    return (whole - first) / (ids.shape[0] * (ids.shape[1] - 1))


def _encode(origin: str, tokenizer: Any, window: int, max_tokens: int, overlap: int) -> Tensor:
    stride = window - overlap
    wanted = max(1, max_tokens // window) * stride + overlap
    ids: list[int] = []
    for text in documents(origin):
        if text.strip():
            ids += _encode_enough(tokenizer, text, wanted - len(ids))
        if len(ids) >= wanted:
            break
    if len(ids) < window:
        raise UserError(
            f"{origin} gives {len(ids)} tokens, fewer than one window of {window}: give more text, or a smaller --window"
        )
    return torch.tensor(ids[:wanted]).unfold(0, window, stride).contiguous()


def _encode_enough(tokenizer: Any, text: str, wanted: int) -> list[int]:
    """The ids of `text`, of a very long one only as far as `wanted` ids need, and the same as those of the whole."""
    length = 8 * wanted + 4096
    while True:
        ids = encode(tokenizer, text[:length])
        # the cut may change the last ids, so a cut text must give some more than wanted
        if length >= len(text) or len(ids) >= wanted + 256:
            return ids
        length *= 2


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The ids of `text`. Raises UserError when the tokenizer breaks on it, as a damaged one does with bare exceptions."""
    try:
        return tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer {tokenizer.name_or_path} encodes no text ({line}): get its files again") from None


def documents(origin: str) -> Iterator[str]:
    """The texts of a file, a folder or a Hub dataset, one after the other. Raises UserError as `load_windows` does."""
    path = Path(origin)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"{origin} holds no text: put {', '.join(TEXT_SUFFIXES)} files there")
        for file in files:
            yield from _file_documents(file)
    elif path.is_file():
        yield from _file_documents(path)
    elif path.suffix in TEXT_SUFFIXES or origin.startswith((".", "/", "~")):
        raise UserError(f"{origin} does not exist: check the path")
    else:
        yield from _hub_documents(origin)


def _file_documents(path: Path) -> Iterator[str]:
    if path.suffix in (".txt", ".md", ".py"):
        yield path.read_text(encoding="utf-8", errors="replace")
        return
    if path.suffix not in TEXT_SUFFIXES:
        raise UserError(f"{path}: kvfold reads {', '.join(TEXT_SUFFIXES)}")
    if path.suffix == ".parquet":
        yield from _dataset_documents(str(path), path="parquet", data_files=str(path), split="train")
    else:
        yield from _texts(str(path), None, _json_rows(path))


def _json_rows(path: Path) -> Iterator[Any]:
    """The rows of a file of JSON lines, or of one array."""
    with path.open(encoding="utf-8") as file:
        try:
            first = next((line for line in file if line.strip()), "")
            if first.lstrip().startswith("["):
                yield from json.loads(first + file.read())
            else:
                yield from map(json.loads, filter(str.strip, itertools.chain([first], file)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as a text or dataset ({error}): check the file") from None


def _hub_documents(origin: str) -> Iterator[str]:
    name, config, split, column = [*origin.split(":"), "", "", ""][:4]
    if not name.strip() or not name.isprintable():
        raise UserError(f"{origin!r} names no text: give a file, a folder, or a Hub dataset name[:config[:split[:column]]]")
    yield from _dataset_documents(origin, column or None, path=name, name=config or None, split=split or "train")


def _dataset_documents(origin: str, column: str | None = None, **load: Any) -> Iterator[str]:
    """Documents of anything `datasets.load_dataset` reads, streamed; from `column`, `text`, or the first text column."""
    import datasets

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what goes wrong is told once, below
    try:
        try:
            rows = datasets.load_dataset(**load, streaming=True)
        except StopIteration:  # what an empty file raises
            return
        yield from _texts(origin, column, rows)
    except UserError:
        raise
    except Exception as error:  # of the library, of what it reads files with, and of the Hub's client
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{origin} cannot be read as a text or dataset ({line}): check the path, the name or the network"
        ) from None


def _texts(origin: str, column: str | None, rows: Iterable[Any]) -> Iterator[str]:
    """The texts in rows: from `column`, `text`, or the first column that holds one. Raises UserError where there is none."""
    for row in rows:
        held = row if isinstance(row, dict) else {}
        if column is None:
            texts = [key for key, value in held.items() if isinstance(value, str)]
            column = "text" if "text" in texts else next(iter(texts), None)
        if column is None or not isinstance(held.get(column), str):
            there = ", ".join(map(str, held))[:200] or "none"
            raise UserError(f"{origin} has no text column {column or ''}: it has {there}; name one as name:config:split:column")
        yield held[column]
