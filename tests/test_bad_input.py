"""What is wrong with the input is said in one line with a remedy, and nothing is left behind that looks like a result."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold.convert.source.checkpoint import INDEX
from tests.helpers import invoke, run_cli, save_model, save_tokenizer, save_tokens

HEADS = ("--to", "gqa", "--kv-heads", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound source of 4 key heads in several shards, without a tokenizer."""
    return save_model(tmp_path_factory.mktemp("source"), "llama", num_key_value_heads=4, max_shard_size="100KB")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that reads text."""
    folder = save_model(tmp_path_factory.mktemp("reader"), "llama", num_key_value_heads=4, vocab_size=300)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokens(tmp_path_factory.mktemp("tokens") / "t.safetensors", 4, 24)


def refused(out: Path, *args: Any, code: int = 2) -> str:
    """Run what must fail with `code`, check its manners, and return what it said."""
    siblings = set(out.parent.iterdir())
    got, text = invoke(*args)
    assert "Traceback" not in text, text
    assert got == code, text
    *before, said = text.strip().splitlines()
    assert said.startswith("kvfold: ")
    assert not before or "--calibrate" in args  # how long it will take is said above it
    assert not out.exists()
    if code == 2:
        assert set(out.parent.iterdir()) == siblings, "something was left behind"
    return text


def test_one_line_is_all_there_is_on_standard_error(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = run_cli("convert", source, tmp_path / "out", *HEADS)
    wanted = f"kvfold: {tmp_path / 'out'} exists: choose another name, or pass --overwrite to replace it\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", wanted)


# The flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--to gqa --kv-heads 3", "4 key heads divide into 1, 2, 4; the nearest is --kv-heads 2"),
        ("--to gqa --kv-heads 7", "the nearest is --kv-heads 4"),
        ("--to gqa --kv-heads 0", "the nearest is --kv-heads 1"),
        ("--to gqa --kv-budget 60%", "the nearest is --kv-heads 2, a budget of 0.5"),
        ("--to gqa --kv-heads 2 --kv-budget 50%", "either --kv-heads or --kv-budget"),
        ("--to gqa", "either --kv-heads or --kv-budget"),
        ("--to gqa --kv-budget 0%", "--kv-budget 0% is no share of the source's cache: write 25% or 0.25"),
        ("--to gqa --kv-budget abc", "write 25% or 0.25"),
        ("--to gqa --kv-budget 130%", "write 25% or 0.25"),
        ("--to gqa --kv-budget 1.2.3", "write 25% or 0.25"),
        ("--to mqa --kv-heads 2", "mqa has one key head: leave --kv-heads and --kv-budget out, or use --to gqa"),
        ("--to mqa --kv-budget 25%", "mqa has one key head"),
        ("--to gqqa --kv-heads 2", "unknown target 'gqqa'. Did you mean gqa? Available: gqa, mqa, mla, mfa, mfa-kr"),
        ("--kv-heads 2", "--to"),
        ("--to mla --kv-rank 8", "--to mla needs calibration text: give --calibrate TEXT, or --calibrate self"),
        ("--to mla --kv-rank 8 --rope-dim 7", "--rope-dim 7 must be even and at most the source's 8: the nearest is 6"),
        ("--to mla --kv-rank 99", "between 1 and the full rank 64: the nearest is 64"),
        ("--to mla --kv-budget 1%", "leaves 0 numbers: the least is 6.25%"),
        ("--to mla --kv-rank 8 --pad-for tgi", "'vllm', 'vllm-cpu' or 'none'"),
        ("--to gqa --kv-heads 2 --rope-dim 4", "--rope-dim belongs to --to mla, not gqa: leave it out"),
        ("--method pac", "unknown method 'pac'. Did you mean pca? Available: mean, first, random, align, pca"),
        ("--grouping nearby", "'neighbours' or 'similar'"),
        ("--dtype bf61", "unknown dtype 'bf61'. Did you mean bf16?"),
        ("--dtype int8", "unknown dtype 'int8'. Available: float32, bfloat16, float16"),
        ("--device warp", "--device warp is not available here: use auto, cpu or cuda"),
        ("--device meta", "--device meta is not available here: use auto, cpu or cuda"),
        ("--max-shard-size lots", "lots is no size: write 5GB, 500MB or 2GiB"),
        ("--max-shard-size 0GB", "0GB is no size"),
        ("--heal-steps -1", "heal_steps: input should be greater than or equal to 0, got -1"),
        ("--heal-lr 0", "heal_lr: input should be greater than 0"),
        ("--heal-lr inf", "heal_lr: input should be less than or equal to 1000000"),
        ("--heal-window 0", "input should be greater than or equal to 1"),
        ("--heal-batch-tokens 0", "heal_batch_tokens"),
        ("--window 1", "window: input should be greater than or equal to 2"),
        ("--calibration-tokens 0", "calibration_tokens: input should be greater than 0"),
        ("--seed 99999999999999999999", "seed"),
        ("--method pac --dtype bf61 --max-shard-size lots", "no size"),
    ],
)
def test_flags(tmp_path: Path, source: Path, flags: str, words: str) -> None:
    needed = () if any(f in flags for f in ("--to", "--kv-heads")) else HEADS
    text = refused(tmp_path / "out", "convert", source, tmp_path / "out", *needed, *flags.split())
    assert words in text


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, source: Path) -> None:
    flags = ("--to", "gqa", "--kv-heads", 3, "--method", "pac", "--dtype", "bf61", "--max-shard-size", "lots")
    text = refused(tmp_path / "out", "convert", source, tmp_path / "out", *flags)
    assert all(words in text for words in ("--kv-heads 2", "mean pca", "mean bf16", "no size"))
    text = refused(tmp_path / "out", "convert", source, tmp_path / "out", *HEADS, "--heal-steps", -1, "--window", 0)
    assert "heal_steps" in text
    assert "window: " in text


def test_a_misspelt_flag_and_a_word_for_a_number(tmp_path: Path, source: Path) -> None:
    for flags, words in (
        (("--heal-stepz", 3), "No such option: --heal-stepz (Possible options: "),
        (("--heal-steps", "many"), "heal_steps: input should be a valid integer"),
        (("--settings",), "Option '--settings' requires an argument"),
    ):
        assert words in refused(tmp_path / "out", "convert", source, tmp_path / "out", *HEADS, *flags)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("to: gqa\nmetod: pca\n", "unknown setting 'metod'. Did you mean method?"),
        ("to: gqa\nkv-heads: 2\n", "unknown setting 'kv-heads'. Did you mean kv_heads?"),
        ("to: gqa\n1: 2\n", "unknown setting '1'"),
        ("to: gqa\nheal_steps: -1\n", "heal_steps: input should be greater than or equal to 0"),
        ("to: [gqa\n", "cannot be read"),
        ("- to\n- gqa\n", "holds no settings: write `name: value` lines"),
        ("settings:\n", "holds no settings: write `name: value` lines"),
        (b"\xff\xfe\x00\x81", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_settings_file(tmp_path: Path, source: Path, content: str | bytes | None, words: str) -> None:
    file = tmp_path / "settings.yaml"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert words in refused(tmp_path / "out", "convert", source, tmp_path / "out", "--settings", file)


# The place


def test_out_exists(tmp_path: Path, source: Path) -> None:
    for make in (Path.mkdir, Path.touch):
        out = tmp_path / make.__name__
        make(out)
        code, text = invoke("convert", source, out, *HEADS)
        assert code == 2
        assert "exists: choose another name, or pass --overwrite to replace it" in text
    (tmp_path / "mkdir" / "precious.txt").touch()
    for out in (tmp_path / "mkdir", tmp_path / "touch"):
        code, text = invoke("convert", source, out, *HEADS, "--overwrite")
        assert code == 2
        assert "is not a checkpoint folder: kvfold will not replace it; choose another name" in text
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mkdir", "precious.txt", "touch"]


def test_out_without_a_name(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, text = invoke("convert", source, ".", *HEADS, "--overwrite")
    assert "Traceback" not in text
    assert code in (0, 2)


def test_out_is_the_source(tmp_path: Path, source: Path) -> None:
    """Even with --overwrite: the source cannot be had again by folding."""
    own = shutil.copytree(source, tmp_path / "own")
    code, text = invoke("convert", own, own, *HEADS, "--overwrite")
    assert code == 2
    assert "choose another name" in text
    assert [p.name for p in tmp_path.iterdir()] == ["own"]
    assert not (own / "kvfold.json").exists()


@pytest.mark.parametrize("verb", ["plan", "convert"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere/model", "does not exist here and is no Hub id (user/name): check the path"),
        ("nobody/nowhere", "no such folder here, and the Hub did not answer"),
        ("empty", "has no config.json: give the folder of a Hugging Face checkpoint or a Hub id"),
        ("file.txt", "file.txt has no config.json"),
    ],
)
def test_source_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    out = () if verb == "plan" else (tmp_path / "out",)
    assert words in refused(tmp_path / "out", verb, name, *out, *HEADS)


# The checkpoint


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; `...` removes one."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def without(key: str) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **{key: ...})


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "cut off": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\x00"), "config.json is not valid JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "no hidden_size": (without("hidden_size"), "config.json lacks 'hidden_size': it is not a complete llama config"),
    "no heads": (without("num_attention_heads"), "config.json lacks 'num_attention_heads'"),
    "no model_type": (without("model_type"), "model_type None is not a family kvfold knows"),
    "null heads": (with_config(num_attention_heads=None), "num_attention_heads"),
    "layers in words": (with_config(num_hidden_layers="two"), "num_hidden_layers"),
    "zero heads": (with_config(num_attention_heads=0), "no valid geometry"),
    "3 of 8 heads": (with_config(num_key_value_heads=3), "8 heads over 3 key heads of width 8 is no valid geometry"),
    "odd width": (with_config(head_dim=7), "even rotary dimension, but got `head_dim`=7"),
    "lama": (
        with_config(model_type="lama"),
        "a family kvfold knows. transformers has no class of that name. The nearest is llama.",
    ),
    "mamba": (with_config(model_type="mamba"), "model_type 'mamba' is not a family kvfold knows"),
    "quantised": (with_config(quantization_config={"bits": 4}), "fold the unquantised checkpoint"),
    "a number that no float holds": (with_config(rope_parameters={"rope_theta": 10**400}), "a number of 401 digits"),
    "labels that fill the memory": (with_config(num_labels=10**9), "num_labels is 1000000000"),
    "keys of other meanings": (with_config(attribute_map={"hidden_size": "vocab_size"}), "attribute_map"),
    "a plan of numbers": (with_config(base_model_tp_plan=5), "base_model_tp_plan is 5, where LlamaConfig has something"),
    "a plan of other parts": (with_config(base_model_pp_plan={"a": 5}), "base_model_pp_plan is {'a': 5}, where LlamaConfig"),
    "a method": (with_config(to_dict=5), "to_dict is 5, where LlamaConfig has something of its own: take it out"),
    "more dropout than all": (
        with_config(attention_dropout=2.0),
        "attention_dropout is 2.0, which is no share between 0 and 1",
    ),
    "dropout of NaN": (
        with_config(model_type="phi3", architectures=None, pad_token_id=0, resid_pdrop=float("nan")),
        "resid_pdrop is nan, which is no share between 0 and 1",
    ),
    "another model's config": (with_config(text_config={"hidden_size": 8}), "it holds the config of another model"),
    "scores over nothing": (with_config(model_type="granite", architectures=None, attention_multiplier=0.0), "above zero"),
    "unknown rope": (with_config(rope_parameters={"rope_type": "wavy", "rope_theta": 1e4}), "wavy"),
}


@pytest.mark.parametrize("verb", ["plan", "convert"])
@pytest.mark.parametrize("case", CONFIGS)
def test_config(tmp_path: Path, source: Path, verb: str, case: str) -> None:
    damage, words = CONFIGS[case]
    folder = shutil.copytree(source, tmp_path / "source")
    damage(folder)
    out = () if verb == "plan" else (tmp_path / "out",)
    assert words in refused(tmp_path / "out", verb, folder, *out, *HEADS)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(name: str, edit: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Edit a tensor in its shard; None takes it out of shard and index."""

    def damage(folder: Path) -> None:
        shard = shard_of(folder, name)
        tensors = load_file(shard)
        edited = edit(tensors.pop(name).clone())
        if edited is None:
            index = json.loads((folder / INDEX).read_text())
            del index["weight_map"][name]
            (folder / INDEX).write_text(json.dumps(index))
        else:
            tensors[name] = edited
        save_file(tensors, shard, {"format": "pt"})

    return damage


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return edit


def rewrite(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Edit the file that holds a query projection."""

    def damage(folder: Path) -> None:
        shard = shard_of(folder, Q)
        shard.write_bytes(edit(shard.read_bytes()))

    return damage


def edit_header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def on_bytes(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.dumps(edit(json.loads(content[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return rewrite(on_bytes)


def edit_index(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(json.dumps(edit(json.loads((folder / INDEX).read_text()))))  # type: ignore[func-returns-value]


Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
K, NORM = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
DAMAGED = "is not a safetensors file, or damaged ("
WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda folder: shard_of(folder, Q).unlink(), "is missing: download the checkpoint again"),
    "shard truncated": (rewrite(lambda b: b[:-1]), DAMAGED),
    "header truncated": (rewrite(lambda b: b[:40]), DAMAGED),
    "length truncated": (rewrite(lambda b: b[:5]), DAMAGED),
    "length absurd": (rewrite(lambda b: b"\xff" * 8 + b[8:]), DAMAGED),
    "header is no JSON": (rewrite(lambda b: b[:8] + b"x" + b[9:]), DAMAGED),
    "header is a list": (edit_header(lambda h: [h]), "download the checkpoint again"),
    "header without offsets": (
        edit_header(lambda h: {**h, Q: {"dtype": "F32", "shape": [64, 64]}}),
        "download the checkpoint again",
    ),
    "shape against size": (edit_header(lambda h: {**h, Q: {**h[Q], "shape": [64, 63]}}), "download the checkpoint again"),
    "packed dtype": (
        edit_header(lambda h: {**h, Q: {**h[Q], "dtype": "F8_E4M3", "shape": [64, 256]}}),
        "start from the unquantised checkpoint",
    ),
    "index names an absent tensor": (
        edit_index(lambda i: {**i, "weight_map": {**i["weight_map"], "ghost": i["weight_map"][Q]}}),
        "names tensor ghost, but model-0",
    ),
    "index is no JSON": (lambda folder: (folder / INDEX).write_text("{"), "is not valid JSON"),
    "index is a list": (edit_index(lambda i: [i]), "index.json"),
    "index without weight_map": (edit_index(lambda i: {}), "weight_map: field required"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "give a folder with safetensors weights"),
    "query shape": (change(Q, lambda t: t[:, :32].contiguous()), "shape (64, 32), but config.json means (64, 64)"),
    "key shape": (change(K, lambda t: t[:8].contiguous()), "shape (8, 64), but config.json means (32, 64)"),
    "MLP shape": (change(UP, lambda t: t[:95].contiguous()), "shape (95, 64), but config.json means (96, 64)"),
    "embedding shape": (change(EMBEDDING, lambda t: t[:100].contiguous()), "shape (100, 64), but config.json means (128, 64)"),
    "query missing": (change(Q, lambda t: None), f"has no tensor {Q}"),
    "MLP missing": (change(UP, lambda t: None), f"has no tensor {UP}"),
    "query NaN": (change(Q, poison(torch.nan)), "holds NaN or infinity: the checkpoint is damaged, get a sound copy"),
    "query infinite": (change(Q, poison(torch.inf)), "holds NaN or infinity: the checkpoint is damaged, get a sound copy"),
    "MLP NaN": (change(UP, poison(torch.nan)), "holds NaN or infinity: the checkpoint is damaged, get a sound copy"),
    "norm NaN": (change(NORM, poison(torch.nan)), "holds NaN or infinity: the checkpoint is damaged, get a sound copy"),
    "embedding NaN": (change(EMBEDDING, poison(torch.nan)), "holds NaN or infinity: the checkpoint is damaged"),
}


@pytest.mark.parametrize("calibrated", [False, True], ids=["alone", "calibrated"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(tmp_path: Path, source: Path, tokens: str, case: str, calibrated: bool) -> None:
    damage, words = WEIGHTS[case]
    folder = shutil.copytree(source, tmp_path / "source")
    damage(folder)
    flags = ("--calibrate", tokens, "--heal-steps", 1) if calibrated else ()
    assert words in refused(tmp_path / "out", "convert", folder, tmp_path / "out", *HEADS, *flags)


def test_pickled_weights_only(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    (folder / "pytorch_model.bin").touch()
    text = refused(tmp_path / "out", "convert", folder, tmp_path / "out", *HEADS)
    assert "holds pickled .bin weights only" in text
    assert "save_pretrained(DIR)` and fold DIR" in text


def test_weights_that_overflow_the_dtype_fail(tmp_path: Path, source: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "source")
    change(UP, poison(1e30))(folder)
    text = refused(tmp_path / "out", "convert", folder, tmp_path / "out", *HEADS, "--dtype", "fp16", code=1)
    assert f"{UP} does not fit torch.float16" in text
    assert "choose a wider --dtype" in text


# The calibration text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "gives 0 tokens, fewer than one window of 16: give more text, or a smaller --window"),
        ("\n \n", "gives 0 tokens, fewer than one window of 16"),
        ("too short", "gives 9 tokens, fewer than one window of 16"),
        (None, "text.txt does not exist: check the path"),
    ],
)
def test_calibration_text(tmp_path: Path, reader: Path, content: str | None, words: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_text(content)
    flags = ("--calibrate", file, "--window", 16)
    assert words in refused(tmp_path / "out", "convert", reader, tmp_path / "out", *HEADS, *flags)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.csv", b"text\nhello\n", "kvfold reads .txt, .md, .py, .jsonl, .json, .parquet"),
        ("broken.jsonl", b'{"text": "a"\n', "cannot be read as a text or dataset"),
        ("numbers.jsonl", b'{"n": 1}\n', "has no text column"),
        ("broken.parquet", b"PAR1 not really", "cannot be read as a text or dataset"),
        ("empty.jsonl", b"", "empty.jsonl"),
    ],
)
def test_calibration_file(tmp_path: Path, reader: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    flags = ("--calibrate", tmp_path / name, "--window", 16)
    assert words in refused(tmp_path / "out", "convert", reader, tmp_path / "out", *HEADS, *flags)


def test_calibration_folder_without_text(tmp_path: Path, reader: Path) -> None:
    (tmp_path / "texts").mkdir()
    flags = ("--calibrate", tmp_path / "texts", "--window", 16)
    text = refused(tmp_path / "out", "convert", reader, tmp_path / "out", *HEADS, *flags)
    assert "holds no text: put .txt, .md, .py, .jsonl, .json, .parquet files there" in text


def test_calibration_text_without_a_tokenizer(tmp_path: Path, source: Path) -> None:
    (tmp_path / "text.txt").write_text("some text " * 20)
    flags = ("--calibrate", tmp_path / "text.txt", "--window", 16)
    text = refused(tmp_path / "out", "convert", source, tmp_path / "out", *HEADS, *flags)
    assert "has no tokenizer that loads" in text
    assert "give tokens as file.safetensors:name" in text


def test_calibration_text_of_another_vocabulary(tmp_path: Path, source: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "source")
    save_tokenizer(folder)  # 258 tokens for a model of 128
    (tmp_path / "text.txt").write_text("café " * 20)
    flags = ("--calibrate", tmp_path / "text.txt", "--window", 16)
    text = refused(tmp_path / "out", "convert", folder, tmp_path / "out", *HEADS, *flags)
    assert "outside the model's vocabulary of 128" in text


@pytest.mark.parametrize(
    ("ids", "name", "words"),
    [
        (torch.tensor([[1, 2, 128]]), "ids", "holds token id 128, outside the model's vocabulary of 128"),
        (torch.tensor([[1, -5, 7]]), "ids", "holds token id -5, outside the model's vocabulary of 128"),
        (torch.tensor([[1, 2, 3]]), "idz", "has no tensor 'idz': choose one of ids"),
        (torch.tensor([[1, 2, 3]]), "", "has no tensor '': choose one of ids"),
        (torch.tensor([1, 2, 3]), "ids", "has shape (3,) and torch.int64: kvfold needs integer rows of 2 or more ids"),
        (torch.tensor([[1.0, 2.0]]), "ids", "kvfold needs integer rows of 2 or more ids"),
        (torch.tensor([[True, False]]), "ids", "kvfold needs integer rows of 2 or more ids"),
        (torch.tensor([[1], [2]]), "ids", "kvfold needs integer rows of 2 or more ids"),
        (torch.zeros(0, 5, dtype=torch.int64), "ids", "kvfold needs integer rows of 2 or more ids"),
        (torch.zeros(2, 129, dtype=torch.int64), "ids", "rows of 129 ids; the source knows 128 positions"),
        (b"no such format", "ids", "is not a readable safetensors file"),
        (None, "ids", "does not exist: give a token file as file.safetensors:name"),
    ],
)
def test_token_file(tmp_path: Path, source: Path, ids: Tensor | bytes | None, name: str, words: str) -> None:
    file = tmp_path / "t.safetensors"
    if isinstance(ids, Tensor):
        save_file({"ids": ids}, file)
    elif ids is not None:
        file.write_bytes(ids)
    flags = ("--calibrate", f"{file}:{name}" if name else file)
    assert words in refused(tmp_path / "out", "convert", source, tmp_path / "out", *HEADS, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--calibrate self:1 --window 16", "write self or self:N, N tokens of at least one --window"),
        ("--calibrate self:many --window 16", "write self or self:N"),
        ("--calibrate self --window 16 --calibration-tokens 8", "write self or self:N"),
        ("--calibrate self", "--window 512 exceeds the 128 positions that the source knows: give --window 128"),
        ("--calibrate self:64 --window 16", "names no bos or eos token to begin text with: give --calibrate a text instead"),
        ("--calibrate nobody/nothing --window 16", "check the path, the name or the network"),
    ],
)
def test_calibration_source(tmp_path: Path, reader: Path, flags: str, words: str) -> None:
    folder = shutil.copytree(reader, tmp_path / "source")
    change_config(folder, bos_token_id=None, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    assert words in refused(tmp_path / "out", "convert", folder, tmp_path / "out", *HEADS, *flags.split())


def test_healing_that_diverges_fails_with_a_remedy(
    tmp_path: Path, source: Path, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise FloatingPointError("healing diverged at step 2 of 8: loss nan")

    monkeypatch.setattr("kvfold.convert.heal_windows.heal", diverge)
    flags = ("--calibrate", tokens, "--heal-steps", 8, "--heal-window", 2)
    text = refused(tmp_path / "out", "convert", source, tmp_path / "out", *HEADS, *flags, code=1)
    assert "healing diverged at step" in text
    assert "pass --heal-dtype float32, lower --heal-lr, or turn healing off with --heal-steps 0" in text
    assert (tmp_path / "out.partial").exists()


# Evaluate


@pytest.fixture(scope="module")
def folded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folded") / "out"
    assert invoke("convert", source, out, *HEADS)[0] == 0
    return out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch 0", "batch: input should be greater than or equal to 1, got 0"),
        ("--window 1", "window: input should be greater than or equal to 2, got 1"),
        ("--max-tokens 0", "max_tokens: input should be greater than 0, got 0"),
        ("--batch 0 --max-tokens -3", "max_tokens: input should be greater than 0, got -3"),
        ("--dtype bf61", "unknown dtype 'bf61'. Did you mean bf16?"),
        ("--device warp", "--device warp is not available here"),
        ("--against ./nowhere/model", "does not exist here and is no Hub id (user/name): check the path"),
    ],
)
def test_evaluate_flags(tmp_path: Path, folded: Path, tokens: str, flags: str, words: str) -> None:
    args = ("evaluate", folded, "--on", tokens, "--report", tmp_path / "report", *flags.split())
    assert words in refused(tmp_path / "report", *args)


def test_evaluate_on_less_than_a_window(tmp_path: Path, reader: Path) -> None:
    (tmp_path / "text.txt").write_text("twelve bytes")
    args = ("evaluate", reader, "--against", reader, "--on", tmp_path / "text.txt", "--window", 13)
    text = refused(tmp_path / "report", *args, "--report", tmp_path / "report")
    assert "gives 12 tokens, fewer than one window of 13: give more text, or a smaller --window" in text


def test_evaluate_without_a_source(tmp_path: Path, source: Path, folded: Path, tokens: str) -> None:
    args = ("--on", tokens, "--report", tmp_path / "report")
    text = refused(tmp_path / "report", "evaluate", source, *args)
    assert "has no kvfold.json that names its source: give it with --against" in text
    orphan = shutil.copytree(folded, tmp_path / "orphan")
    for content in ("{", "{}", "[]"):
        (orphan / "kvfold.json").write_text(content)
        text = refused(tmp_path / "report", "evaluate", orphan, *args)
        assert "kvfold.json is" in text
        assert "convert again, or remove it and give --against" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 300}, "has vocab_size 128"),
        ({"num_hidden_layers": 3}, "give the source that it was folded from"),
        ({"hidden_size": 32}, "give the source that it was folded from"),
    ],
)
def test_evaluate_against_another_model(tmp_path: Path, folded: Path, tokens: str, changes: dict[str, Any], words: str) -> None:
    other = save_model(tmp_path / "other", "llama", num_key_value_heads=4, **changes)
    args = ("evaluate", folded, "--against", other, "--on", tokens, "--report", tmp_path / "report")
    text = refused(tmp_path / "report", *args)
    assert words in text
    assert str(folded) in text


@pytest.mark.parametrize("damaged", ["checkpoint", "source"])
def test_evaluate_truncated_weights(tmp_path: Path, source: Path, folded: Path, tokens: str, damaged: str) -> None:
    broken = shutil.copytree(folded if damaged == "checkpoint" else source, tmp_path / "broken")
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    models = (broken, "--against", source) if damaged == "checkpoint" else (folded, "--against", broken)
    text = refused(tmp_path / "report", "evaluate", *models, "--on", tokens, "--report", tmp_path / "report")
    assert str(broken) in text


def test_evaluate_with_a_tensor_missing(tmp_path: Path, source: Path, folded: Path, tokens: str) -> None:
    """transformers would fill it with random numbers and go on."""
    torn = Path(shutil.copytree(folded, tmp_path / "torn"))
    tensors = load_file(torn / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, torn / "model.safetensors", {"format": "pt"})
    text = refused(tmp_path / "report", "evaluate", torn, "--against", source, "--on", tokens)
    assert f"{torn} lacks model.layers.1.self_attn.o_proj.weight: convert" in text


def test_evaluate_with_a_tensor_too_many(tmp_path: Path, source: Path, folded: Path, tokens: str) -> None:
    """transformers would leave it out and go on: with such a config, the model is another."""
    other = Path(shutil.copytree(folded, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    text = refused(tmp_path / "report", "evaluate", other, "--against", source, "--on", tokens)
    assert "'model.layers.1.self_attn.q_norm.weight', for which the model of its config.json has no place" in text


def test_evaluate_on_ids_outside_the_vocabulary(tmp_path: Path, folded: Path) -> None:
    large = save_tokens(tmp_path / "large.safetensors", 4, 24, vocab=1000)
    text = refused(tmp_path / "report", "evaluate", folded, "--on", large, "--report", tmp_path / "report")
    assert "outside the model's vocabulary of 128" in text
