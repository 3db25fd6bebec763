"""Files in, files out: what is written is what safetensors reads, and nothing half-written looks like a checkpoint."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold.convert.output.partial import JOURNAL, Partial, partial_folder
from kvfold.convert.output.writer import CheckpointWriter, assign_shards
from kvfold.convert.source.checkpoint import DTYPES, INDEX, SINGLE, CheckpointReader, TensorSpec, is_finite
from kvfold.errors import ConversionError, UserError
from tests.helpers import invoke, save_model

JOB = {"settings": {"source": "here", "seed": 0}}


def make(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50
    return values > 0 if dtype == torch.bool else values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


def checkpoint(folder: Path, tensors: dict[str, Tensor]) -> CheckpointReader:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    return CheckpointReader(folder)


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


@contextmanager
def writing(
    out: Path, specs: list[TensorSpec], max_shard_size: int = 10**9, job: dict[str, Any] = JOB, **options: bool
) -> Iterator[CheckpointWriter]:
    with Partial(out, JOURNAL, **options) as partial, CheckpointWriter(partial, specs, max_shard_size, job) as writer:
        yield writer


def write(out: Path, tensors: dict[str, Tensor], max_shard_size: int = 10**9, **options: Any) -> None:
    with writing(out, specs_of(tensors), max_shard_size, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit({"config.json": "{}"}, [])


ALL = {f"{name} {shape}": make(dtype, shape) for name, dtype in DTYPES.items() for shape in ((3, 5), (7,), ())}
TEN_KB = {f"layer.{i}": torch.full((250,), float(i)) for i in range(10)}  # 1000 bytes each


def test_every_dtype_and_shape_comes_back_from_reader_writer_and_safetensors(tmp_path: Path) -> None:
    reader = checkpoint(tmp_path / "source", ALL)
    assert set(reader.entries) == set(ALL)
    with writing(tmp_path / "out", specs_of(ALL)) as writer:
        for number, name in enumerate(reversed(ALL)):  # in any order
            writer.copy(name, reader) if number % 2 else writer.write(name, reader.tensor(name))
            assert torch.equal(writer.read(name), ALL[name])
        writer.commit({"config.json": "{}"}, [])
    loaded, again = load_file(tmp_path / "out" / SINGLE), CheckpointReader(tmp_path / "out")
    for name, tensor in ALL.items():
        for got in (reader.tensor(name), loaded[name], again.tensor(name)):
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got, tensor), name


def test_one_shard_has_no_index_and_says_pt(tmp_path: Path) -> None:
    write(tmp_path / "out", TEN_KB)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", SINGLE}
    with safe_open(tmp_path / "out" / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.keys()) == sorted(TEN_KB)


def test_shards_fill_in_order_and_the_index_names_each(tmp_path: Path) -> None:
    write(tmp_path / "out", TEN_KB, max_shard_size=3999)
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", INDEX, *names}
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index == {"metadata": {"total_size": 10_000}, "weight_map": {f"layer.{i}": names[i // 3] for i in range(10)}}
    for name in names:
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {t for t, shard in index["weight_map"].items() if shard == name}
    reader = CheckpointReader(tmp_path / "out")
    assert all(torch.equal(reader.tensor(name), t) for name, t in TEN_KB.items())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    sizes = (10, 500, 10, 10)  # elements of one byte
    shards = assign_shards([TensorSpec(str(i), torch.uint8, (n,)) for i, n in enumerate(sizes)], 20)
    assert [[s.name for s in shard] for shard in shards] == [["0"], ["1"], ["2", "3"]]
    write(tmp_path / "out", {"small": torch.ones(2), "large": torch.arange(500.0)}, max_shard_size=100)
    assert torch.equal(load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")["large"], torch.arange(500.0))


def test_convert_shards_by_max_shard_size_and_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_model(tmp_path / "source", "llama")
    assert invoke("convert", source, tmp_path / "out", "--to", "mqa", "--max-shard-size", "60KB")[0] == 0
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    loaded = {shard: load_file(tmp_path / "out" / shard) for shard in shards}
    assert all(sum(t.nbytes for t in held.values()) <= 60_000 for held in loaded.values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in loaded.values() for t in held.values())
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert set(state) == set(index["weight_map"])
    assert all(torch.equal(state[name], loaded[shard][name]) for name, shard in index["weight_map"].items())


def test_copied_bytes_are_the_sources_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces smaller than a tensor, and NaN payloads aside, which are refused."""
    monkeypatch.setattr("kvfold.convert.source.checkpoint.CHUNK", 64)
    tensors = {"odd": make(torch.bool, (1001,)), "half": make(torch.bfloat16, (77, 3)), "zero": torch.tensor([0.0, -0.0])}
    reader = checkpoint(tmp_path / "source", tensors)
    with writing(tmp_path / "out", specs_of(tensors), 1000) as writer:
        for name in tensors:
            writer.copy(name, reader)
        writer.commit({"config.json": "{}"}, [])
    after = CheckpointReader(tmp_path / "out")
    for name, tensor in tensors.items():
        wanted = tensor.view(torch.uint8).numpy().tobytes()
        assert wanted == b"".join(map(bytes, reader.chunks(name))) == b"".join(map(bytes, after.chunks(name)))


def test_copy_casts_where_the_dtype_changes_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    tensors = {"fits": torch.tensor([1.0, 1 / 3, -65000.0]), "large": torch.tensor([1.0, 1e30]), "ids": torch.tensor([5])}
    reader = checkpoint(tmp_path / "source", tensors)
    specs = [TensorSpec(n, torch.float16 if t.is_floating_point() else t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    with writing(tmp_path / "out", specs) as writer:
        for name in ("fits", "ids"):
            writer.copy(name, reader)
        assert torch.equal(writer.read("fits"), tensors["fits"].half())
        assert torch.equal(writer.read("ids"), tensors["ids"])
        with pytest.raises(ConversionError, match=r"large does not fit torch.float16.*wider --dtype"):
            writer.copy("large", reader)
        with pytest.raises(ConversionError, match=r"fits has shape \(2,\), planned \(3,\)"):
            writer.write("fits", torch.ones(2))


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.is_floating_point])
def test_large_finite_values_are_no_damage_and_a_single_nan_is(tmp_path: Path, dtype: torch.dtype) -> None:
    largest = torch.full((8,), torch.finfo(dtype).max, dtype=dtype)
    reader = checkpoint(tmp_path / "sound", {"mask": largest})
    assert torch.equal(reader.tensor("mask"), largest)
    assert sum(len(piece) for piece in reader.chunks("mask")) == largest.nbytes
    for number, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        damaged = torch.ones(40, dtype=dtype)
        damaged[17] = value
        reader = checkpoint(tmp_path / f"damaged{number}", {"w": damaged})
        with pytest.raises(UserError, match=r"tensor w in .* holds NaN or infinity.*sound copy"):
            reader.tensor("w")
        with pytest.raises(UserError, match=r"tensor w in .* holds NaN or infinity.*sound copy"):
            list(reader.chunks("w"))
    assert torch.equal(reader.tensor("w", check_finite=False), damaged)


def test_out_appears_only_at_commit(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("theirs")
    out, partial = tmp_path / "out", partial_folder(tmp_path / "out")
    with writing(out, specs_of(TEN_KB)) as writer:
        for name, tensor in TEN_KB.items():
            writer.write(name, tensor)
            writer.finish(name, {})
        assert not out.exists()
        assert not (partial / "config.json").exists()
        writer.commit({"config.json": "{}", "kvfold.json": "[]"}, [tmp_path / "tokenizer.json"])
    assert not partial.exists()
    assert {p.name for p in out.iterdir()} == {SINGLE, "config.json", "kvfold.json", "tokenizer.json"}
    assert (out / "tokenizer.json").read_text() == "theirs"


def interrupted(out: Path, finished: int) -> Path:
    """Write and journal so many tensors, then die; returns the journal."""

    def begin() -> None:
        with writing(out, specs_of(TEN_KB)) as writer:
            for name in list(TEN_KB)[:finished]:
                writer.write(name, TEN_KB[name])
                writer.finish(name, {"number": name[-1]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    return partial_folder(out) / JOURNAL


def test_an_exception_keeps_the_partial_folder_and_makes_no_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, 2)
    assert not out.exists()
    with writing(out, specs_of(TEN_KB), resume=True) as writer:
        assert writer.finished == {"layer.0": {"number": "0"}, "layer.1": {"number": "1"}}
        assert torch.equal(writer.read("layer.1"), TEN_KB["layer.1"])
    with pytest.raises(UserError, match="interrupted conversion: go on with --resume, or start anew with --overwrite"):
        write(out, TEN_KB)
    with writing(out, specs_of(TEN_KB), overwrite=True) as writer:  # from the beginning
        assert writer.finished == {}
        assert torch.equal(writer.read("layer.1"), torch.zeros(250))


def test_another_job_is_not_resumed_and_loses_nothing(tmp_path: Path) -> None:
    journal = interrupted(tmp_path / "out", 2)
    before = journal.read_text()
    other = {"settings": {"source": "here", "seed": 1}}
    with (
        pytest.raises(UserError, match=r"other settings \(seed\): repeat it with the same, or start anew with --overwrite"),
        writing(tmp_path / "out", specs_of(TEN_KB), job=other, resume=True),
    ):
        pass
    assert journal.read_text() == before


def test_a_half_written_journal_line_is_forgotten_and_the_journal_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = interrupted(out, 3)
    journal.write_text(journal.read_text()[:-9])  # killed while it wrote the third
    units = {"layer.0": {"number": "0"}, "layer.1": {"number": "1"}}
    with writing(out, specs_of(TEN_KB), resume=True) as writer:
        assert writer.finished == units
        writer.finish("layer.2", {"number": "2"})
        writer.finish("layer.3", {"number": "3"})
    with writing(out, specs_of(TEN_KB), resume=True) as writer:  # killed again
        assert writer.finished == units | {f"layer.{i}": {"number": str(i)} for i in (2, 3)}


def test_out_is_replaced_only_with_overwrite_and_only_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, {"w": torch.zeros(3)})
    with pytest.raises(UserError, match="exists: choose another name, or pass --overwrite"):
        write(out, {"w": torch.ones(3)})
    with writing(out, specs_of({"w": torch.ones(3)}), overwrite=True) as writer:
        writer.write("w", torch.ones(3))
        assert torch.equal(load_file(out / SINGLE)["w"], torch.zeros(3))  # the old one stands until the new one does
        writer.commit({"config.json": "{}"}, [])
    assert torch.equal(load_file(out / SINGLE)["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match="not a checkpoint folder: kvfold will not replace it; choose another name"):
            write(tmp_path / name, {"w": torch.ones(3)}, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    write(tmp_path / "empty", {"w": torch.ones(3)}, overwrite=True)
    assert (tmp_path / "empty" / SINGLE).exists()


def test_replacing_never_loses_the_old_one_or_a_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, {"w": torch.zeros(3)})
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "notes.txt").write_text("the user's own")
    write(out, {"w": torch.ones(3)}, overwrite=True)
    assert torch.equal(load_file(out / SINGLE)["w"], torch.ones(3))
    assert (tmp_path / "out.old" / "notes.txt").read_text() == "the user's own"

    rename = os.rename

    def fail_to_name_it_out(old: Path, new: Path) -> None:
        if Path(new) == out and Path(old) == partial_folder(out) / "result":
            raise OSError(errno.EIO, "broken")
        rename(old, new)

    monkeypatch.setattr("kvfold.convert.output.partial.exchange", lambda one, other: False)  # as on a system that cannot
    monkeypatch.setattr(os, "rename", fail_to_name_it_out)
    with pytest.raises(OSError, match="broken"):
        write(out, {"w": torch.full((3,), 2.0)}, overwrite=True)
    assert torch.equal(load_file(out / SINGLE)["w"], torch.ones(3))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=3)


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for so many calls, then a full disk."""
    left = iter(range(calls))
    return lambda *args, **kwargs: no_space() if next(left, None) is None else function(*args, **kwargs)


def test_a_disk_too_small_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 layers of q, o (64×64), k, v (8×64), three 64×96 and two norms, two embeddings of 128×64, the last norm; float32
    need = 4 * (3 * (2 * 64 * 64 + 2 * 8 * 64 + 3 * 64 * 96 + 2 * 64) + 2 * 128 * 64 + 64)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    code, text = invoke("convert", source, tmp_path / "out", "--to", "mqa")
    assert code == 2
    assert f"has {need - 1:,} bytes free and out needs about {need:,}: free some, or write elsewhere" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("place", "finished"), [("tensors", 1), ("journal", 2), ("last files", 3)])
def test_a_disk_full_on_the_way_keeps_what_was_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, finished: int
) -> None:
    flags = ("--to", "mqa", "--max-shard-size", "60KB")
    with monkeypatch.context() as patched:
        if place == "tensors":
            put, some = CheckpointWriter._put, after(6, CheckpointWriter._put)  # of the layers: the rest is copied beside
            patched.setattr(CheckpointWriter, "_put", lambda *args: (some if args[-1] else put)(*args))
        elif place == "journal":
            patched.setattr(CheckpointWriter, "finish", after(2, CheckpointWriter.finish))
        else:
            patched.setattr(shutil, "copyfile", no_space)
        code, text = invoke("convert", source, tmp_path / "out", *flags)
    assert code == 1
    assert "Traceback" not in text
    assert "No space left on device" in text
    assert "free some of the disk; then repeat with --resume" in text
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "journal.jsonl").read_text().count('"unit"') == {"tensors": 1, "journal": 2}.get(
        place, 3
    )

    assert invoke("convert", source, tmp_path / "out", *flags, "--resume")[0] == 0
    assert invoke("convert", source, tmp_path / "whole", *flags)[0] == 0
    resumed, whole = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("out", "whole"))
    assert resumed.keys() == whole.keys()
    assert [n for n in whole if n != "kvfold.json" and resumed[n] != whole[n]] == []


def test_resume_with_other_flags_says_which(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", no_space)
        assert invoke("convert", source, tmp_path / "out", "--to", "gqa", "--kv-heads", 2)[0] == 1
    code, text = invoke("convert", source, tmp_path / "out", "--to", "gqa", "--kv-heads", 4, "--resume")
    assert code == 2
    assert "kv_heads" in text
    assert "with --overwrite" in text
    assert (tmp_path / "out.partial" / "journal.jsonl").exists()
    assert not (tmp_path / "out").exists()


def test_peak_memory_is_this_process_s_own() -> None:
    """A child of one that held 400 MiB does not count them, and counts its own 100."""
    own = "from kvfold.convert.output.record import peak_memory as peak; a = peak(); b = b'x' * (100 << 20); print(a, peak())"
    code = f"b = b'x' * (400 << 20)\ndel b\nimport subprocess, sys\nsubprocess.run([sys.executable, '-c', {own!r}], check=True)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = (int(part) / 2**20 for part in ran.stdout.split())
    assert before < 200 and 95 < after - before < 105


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nan_and_infinity_are_found_wherever_they_stand_and_nothing_else_is(dtype: torch.dtype) -> None:
    sound = torch.zeros(3, 50_000, dtype=dtype)
    sound[2, 49_999], sound[1, 7], sound[0, 0] = torch.finfo(dtype).max, torch.finfo(dtype).min, -0.0
    assert is_finite(sound)
    assert is_finite(sound.T)
    assert is_finite(sound[:0])
    for value in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        damaged = sound.clone()
        damaged[2, 49_999] = value
        assert not is_finite(damaged)
        assert not is_finite(damaged[2, 49_999])
