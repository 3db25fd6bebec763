"""Text and tokens: every way in gives the ids that the tokenizer gives, cut without overlap."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.data import Windows, calibration_windows, load_tokenizer, load_windows
from kvfold.errors import UserError
from tests.helpers import save_tokenizer, save_tokens, tiny_config

DOCUMENTS = [
    "Once upon a time there was a little key head.",
    "It had eight brothers — and näive values.\nThey lived in a cache.",
    "",
    "One day\tthey were folded. 0123456789",
]
FILLED = [text for text in DOCUMENTS if text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that puts <s> before every text: where documents begin shows in the ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, merges=[("h", "e"), ("e", "r"), ("t", "he")], bos=True)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def by_hand(tokenizer: PreTrainedTokenizerFast, texts: list[str], window: int, max_tokens: int = 10**6) -> list[list[int]]:
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    return [ids[start : start + window] for start in range(0, min(len(ids), max_tokens) - window + 1, window)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def windows(origin: object, folder: Path, window: int = 16, max_tokens: int = 10**6, **options: Any) -> Windows:
    return load_windows(str(origin), folder, window, max_tokens, **options)


def test_the_tokenizer_is_the_one_that_was_saved(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("the her")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "the", "Ġ", "he", "r"]
    assert load_tokenizer(folder)("the her")["input_ids"] == ids


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document(tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, suffix: str) -> None:
    text = "\n\n".join(DOCUMENTS)
    (tmp_path / f"text{suffix}").write_text(text, encoding="utf-8")
    got = windows(tmp_path / f"text{suffix}", folder)
    assert got.ids.dtype == torch.int64
    assert got.ids.tolist() == by_hand(tokenizer, [text], 16)
    assert got.ids.flatten().tolist().count(tokenizer.convert_tokens_to_ids("<s>")) == 1
    assert got.origin == str(tmp_path / f"text{suffix}")


def test_overlapping_windows_predict_every_token_once(tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "text.txt").write_text(FILLED[0] + FILLED[1], encoding="utf-8")
    ids = tokenizer(FILLED[0] + FILLED[1])["input_ids"]
    got = windows(tmp_path / "text.txt", folder, overlap=1).ids
    assert got[:, 1:].flatten().tolist() == ids[1 : 1 + 15 * len(got)]
    assert got[:, 0].tolist() == ids[: 15 * len(got) : 15]
    assert len(got) == (len(ids) - 1) // 15
    assert len(windows(tmp_path / "text.txt", folder, 16, 48, overlap=1).ids) == 3


def test_rows_of_jsonl_json_and_parquet_are_documents(tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    wanted = by_hand(tokenizer, FILLED, 16)
    assert len(wanted) == 8
    rows = [{"text": text, "n": i} for i, text in enumerate(DOCUMENTS)]
    jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    parquet(tmp_path / "rows.parquet", {"n": [0, 1, 2, 3], "text": DOCUMENTS})
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        assert windows(tmp_path / name, folder).ids.tolist() == wanted, name


def test_a_folder_is_its_files_in_order(tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = tmp_path / "texts"
    (texts / "b").mkdir(parents=True)
    (texts / "c.txt").write_text(FILLED[2], encoding="utf-8")
    jsonl(texts / "b" / "rows.jsonl", [{"text": FILLED[1]}])
    (texts / "a.md").write_text(FILLED[0], encoding="utf-8")
    (texts / "picture.png").write_bytes(b"\x89PNG")
    assert windows(texts, folder).ids.tolist() == by_hand(tokenizer, FILLED, 16)


def test_the_text_column_is_found(tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """`text` where there is one, else the first column of strings."""
    wanted = by_hand(tokenizer, FILLED, 16)
    both = jsonl(tmp_path / "both.jsonl", [{"title": "no", "text": text} for text in FILLED])
    first = parquet(tmp_path / "first.parquet", {"n": [1, 2, 3], "content": FILLED, "title": ["no"] * 3})
    assert windows(both, folder).ids.tolist() == wanted
    assert windows(first, folder).ids.tolist() == wanted
    none = jsonl(tmp_path / "none.jsonl", [{"n": 1, "m": [2]}])
    with pytest.raises(UserError, match=r"none.jsonl has no text column.*it has n, m"):
        windows(none, folder)


def test_the_named_column_of_a_dataset_is_taken(
    tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`name:config:split:column`, with a stand-in for the Hub."""
    import datasets

    asked: list[dict[str, Any]] = []

    def stand_in(**load: Any) -> list[dict[str, str]]:
        asked.append(load)
        return [{"text": "no", "story": text} for text in FILLED]

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    got = windows("someone/stories:small:validation:story", folder)
    assert got.ids.tolist() == by_hand(tokenizer, FILLED, 16)
    windows("someone/stories:::story", folder)
    assert asked == [
        {"path": "someone/stories", "name": "small", "split": "validation", "streaming": True},
        {"path": "someone/stories", "name": None, "split": "train", "streaming": True},
    ]
    with pytest.raises(UserError, match=r"has no text column poem: it has text, story; name one"):
        windows("someone/stories:::poem", folder)


def test_a_dataset_out_of_reach_is_the_users_error(folder: Path) -> None:
    with pytest.raises(UserError, match=r"nobody/nothing.*check the path, the name or the network") as caught:
        windows("nobody/nothing:config:train:text", folder)
    assert "\n" not in str(caught.value)


def test_windows_repeat_and_do_not_overlap(tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(f"{i:04d}" for i in range(1000))
    (tmp_path / "text.txt").write_text(text)
    one, two = (windows(tmp_path / "text.txt", folder, 50, 2050) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert one.ids.shape == (41, 50)
    assert tokenizer.decode(one.ids.flatten().tolist(), skip_special_tokens=True) == text[:2049]


@pytest.mark.parametrize(
    ("window", "max_tokens", "shape"),
    [
        (16, 64, (4, 16)),
        (16, 79, (4, 16)),
        (16, 80, (5, 16)),
        (16, 10, (1, 16)),  # at least one
        (7, 10**6, (28, 7)),  # 200 ids, and 4 left over
        (200, 10**6, (1, 200)),
    ],
)
def test_max_tokens_of_text_and_of_rows(tmp_path: Path, folder: Path, window: int, max_tokens: int, shape: tuple) -> None:
    (tmp_path / "text.txt").write_text("x" * 199)  # and <s>
    assert windows(tmp_path / "text.txt", folder, window, max_tokens).ids.shape == shape
    rows = save_tokens(tmp_path / "t.safetensors", shape[0] if max_tokens == 10**6 else 9, window)
    assert windows(rows, folder, window, max_tokens).ids.shape == shape


def read(origins: str, folder: Path, tokens: int, window: int = 8, **healing: Any) -> Windows:
    plan = make_plan(
        tiny_config("llama", vocab_size=300).to_dict(),
        ConvertSettings(to="gqa", kv_heads=2, calibrate=origins, calibration_tokens=tokens, window=window, **healing),
    )
    windows = calibration_windows(plan, folder, torch.device("cpu"), lambda line: None)
    assert windows is not None
    return windows


def calibrated(origins: str, folder: Path, tokens: int, window: int = 8) -> list[list[int]]:
    return read(origins, folder, tokens, window).ids.tolist()


def test_several_calibration_texts_are_mixed_evenly(tmp_path: Path, folder: Path) -> None:
    """As many tokens of each as there are, spread over the whole: a's and b's, of which there are few."""
    for letter, count in (("a", 1000), ("b", 16)):
        (tmp_path / f"{letter}.txt").write_text(letter * count)
    both = f"{tmp_path}/a.txt, {tmp_path}/b.txt"
    rows = calibrated(both, folder, 96)
    a, b = (load_tokenizer(folder).convert_tokens_to_ids(letter) for letter in "ab")
    assert "".join({a: "a", b: "b"}[row[-1]] for row in rows) == "aabaaaba"  # six windows of a's, two of b's
    assert [row[-1] for row in calibrated(f"{tmp_path}/a.txt", folder, 96)] == [a] * 12
    with pytest.raises(UserError, match="are less than a --window of 8 for each of 2 texts: take more tokens"):
        calibrated(both, folder, 15)
    with pytest.raises(UserError, match="name one text, or several separated by single commas"):
        calibrated(f"{both},", folder, 96)
    rows_of = save_tokens(tmp_path / "rows.safetensors", 4, 12)
    with pytest.raises(UserError, match="has windows of 12 ids and .*a.txt of 8: give texts of one --window"):
        calibrated(f"{tmp_path}/a.txt,{rows_of}", folder, 96)
    (tmp_path / "a, b.txt").write_text("c" * 100)  # a path may have commas
    assert not {row[-1] for row in calibrated(f"{tmp_path}/a, b.txt", folder, 96)} & {a, b}


def test_healing_reads_on_where_it_has_steps_for_more(tmp_path: Path, folder: Path) -> None:
    """What follows the calibration text, as far as it goes, and not at all where layers are healed a few at a time."""
    (tmp_path / "a.txt").write_text("".join(chr(97 + n % 26) for n in range(399)))  # 400 ids
    (tmp_path / "b.txt").write_text("Z" * 100)
    a, b, whole = f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", windows(tmp_path / "a.txt", folder, 8, 10**6).ids
    steps = {"heal_steps": 10, "heal_batch_tokens": 16}
    found = read(a, folder, 96, **steps)
    assert found.ids.tolist() == whole[:12].tolist() and found.more is not None
    assert found.more.tolist() == whole[12:20].tolist()  # 160 tokens
    assert found.all.tolist() == whole[:20].tolist()
    assert len(read(a, folder, 40, heal_steps=10**6).all) == 40  # never more than eight times what layers are folded on
    assert len(read(a, folder, 96, heal_steps=10**6).all) == 50  # all there is
    assert read(a, folder, 96, heal_steps=10, heal_batch_tokens=8).all.tolist() == whole[:12].tolist()
    assert read(a, folder, 96, **steps, heal_window=2).all.tolist() == whole[:12].tolist()
    both = read(f"{a},{b}", folder, 96, **steps)
    z = load_tokenizer(folder).convert_tokens_to_ids("Z")
    assert both.more is not None
    assert "".join("Z" if row[-1] == z else "a" for row in both.more.tolist()) == "aZaZaZaZ"
    rows = save_tokens(tmp_path / "rows.safetensors", 9, 12)
    assert [len(part) for part in (read(rows, folder, 48).ids, read(rows, folder, 48).all)] == [4, 9]


def test_one_token_short_of_a_window(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 199)
    with pytest.raises(UserError, match=r"gives 200 tokens, fewer than one window of 201: give more text"):
        windows(tmp_path / "text.txt", folder, 201)


def test_max_tokens_are_reached_over_documents(tmp_path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Only as many documents as needed are read, and the ids are the same as from all of them."""
    texts = [f"document {i} " * 3 for i in range(50)]
    file = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    assert windows(file, folder, 16, 160).ids.tolist() == by_hand(tokenizer, texts, 16, 160)


def test_a_document_of_long_tokens_is_not_cut_short(tmp_path: Path) -> None:
    """Runs of spaces are single tokens of dozens of characters in the vocabularies of Llama 3 and Qwen."""
    saved = save_tokenizer(tmp_path)
    saved.add_tokens([" " * 64])
    saved.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text((" " * 64 + "x") * 40)
    got = windows(tmp_path / "text.txt", tmp_path, 16, 64)
    assert got.ids.tolist() == by_hand(saved, [(" " * 64 + "x") * 40], 16, 64)


def test_bytes_per_token_of_bytes_is_one(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("Plain ASCII, one token for each byte. " * 20)
    got = windows(tmp_path / "text.txt", tmp_path, 16, 160)
    assert got.bytes_per_token == 1.0
    save_file({"ids": got.ids}, tmp_path / "t.safetensors")
    assert windows(f"{tmp_path}/t.safetensors:ids", tmp_path).bytes_per_token == 1.0


def test_bytes_per_token_counts_utf8_and_merges(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, merges=[("a", "a"), ("aa", "aa"), ("Ã", "©")])  # é is C3 A9, which byte-level BPE writes Ã©
    for text, size in (("aaaa", 4.0), ("é", 2.0)):
        (tmp_path / "text.txt").write_text(text * 100, encoding="utf-8")
        assert windows(tmp_path / "text.txt", tmp_path, 10).bytes_per_token == size
    rows = torch.tensor([load_tokenizer(tmp_path)("aaaab" * 4)["input_ids"]] * 3)
    save_file({"ids": rows}, tmp_path / "t.safetensors")
    # 8 ids in a row, 20 bytes; the first, of 4 bytes, is not predicted
    assert windows(f"{tmp_path}/t.safetensors:ids", tmp_path).bytes_per_token == 16 / 7


def test_bytes_per_token_is_of_the_windows_not_of_the_text(tmp_path: Path) -> None:
    """A text that changes behind the last window must not change bits per byte."""
    save_tokenizer(tmp_path, merges=[("a", "a")])
    (tmp_path / "text.txt").write_text("a" * 64 + "bc" * 500)
    got = windows(tmp_path / "text.txt", tmp_path, 16, 32)
    assert got.ids.unique().numel() == 1
    assert got.bytes_per_token == 2.0


def test_token_rows_are_the_windows_as_they_are(tmp_path: Path, folder: Path) -> None:
    origin = save_tokens(tmp_path / "t.safetensors", 6, 11, name="evaluation")
    rows = load_file(tmp_path / "t.safetensors")["evaluation"]
    assert rows.dtype == torch.int16
    got = windows(origin, folder, window=500, vocab_size=128)  # the rows' length wins
    assert got.ids.dtype == torch.int64
    assert torch.equal(got.ids, rows.long())
    assert torch.equal(windows(origin, folder, max_tokens=44).ids, rows[:4].long())
    (tmp_path / "bare").mkdir()
    assert windows(origin, tmp_path / "bare").bytes_per_token is None  # no tokenizer: nothing to count with
    with pytest.raises(UserError, match="outside the model's vocabulary of 100"):
        windows(origin, folder, vocab_size=100)


def test_text_that_is_no_utf8_is_read_all_the_same(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve ".encode("latin-1") * 20)
    assert windows(tmp_path / "latin.txt", folder).ids.shape[0] >= 7
