"""What an interruption leaves, what a resume believes, and two at once."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kvfold.convert.output.files import write_whole
from kvfold.convert.output.partial import JOURNAL, LOCK, RUN, Partial, exchange
from kvfold.convert.output.writer import CheckpointWriter
from kvfold.errors import ConversionError, UserError
from kvfold.evaluation.unfinished import PARTIAL, Unfinished
from tests.helpers import invoke, save_model, save_tokens


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def checkpoint(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


# The folder


def test_the_second_writer_is_refused_with_the_process_of_the_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Partial(out, JOURNAL) as first:
        (first.folder / JOURNAL).write_text("{}")
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"being written by another kvfold, process {os.getpid()}: wait for it"):
                Partial(out, JOURNAL, **options)
        assert (first.folder / JOURNAL).read_text() == "{}"
    with pytest.raises(UserError, match="holds an interrupted conversion: go on with --resume"):
        Partial(out, JOURNAL)
    assert Partial(out, JOURNAL, resume=True).resumed


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"])
def test_what_kvfold_did_not_make_is_not_touched(tmp_path: Path, options: dict[str, bool]) -> None:
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "thesis.txt").write_text("years of work")
    (tmp_path / "file.partial").write_text("a letter")
    (tmp_path / "link.partial").symlink_to(tmp_path / "folder.partial")
    for name in ("folder", "file", "link"):
        with pytest.raises(UserError, match=rf"{name}.partial is in the way and none of kvfold's: move it"):
            Partial(tmp_path / name, JOURNAL, **options)
    uptraining = Partial(tmp_path / "out", RUN)
    (uptraining.folder / RUN).write_text("{}")
    del uptraining
    with pytest.raises(UserError, match="holds an interrupted uptraining: finish that with --resume, remove the folder"):
        Partial(tmp_path / "out", JOURNAL, **options)
    assert (tmp_path / "out.partial" / RUN).exists()
    assert (tmp_path / "folder.partial" / "thesis.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_written_is_found_out_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out.partial cannot be written \(Not a directory\): choose another place"):
        Partial(tmp_path / "file" / "out", JOURNAL)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="dangling is a link to nothing"):
        Partial(tmp_path / "dangling", JOURNAL)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_while_names_change_leaves_one_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    """With an exchange in one step there is the new one and only cleaning up is left; with two renames the old one returns."""
    out, rename = checkpoint(tmp_path / "out", "old"), os.rename
    partial = Partial(out, JOURNAL, overwrite=True)
    (partial.folder / JOURNAL).write_text("{}")
    made = checkpoint(partial.folder / "result", "new")

    def killed(one: Path, other: Path) -> bool:
        if can_exchange:
            exchange(one, other)
        else:
            rename(other, partial.folder / "replaced")
        raise KeyboardInterrupt

    monkeypatch.setattr("kvfold.convert.output.partial.exchange", killed)
    with pytest.raises(KeyboardInterrupt), partial:
        partial.give_name(made)
    assert out.exists() == can_exchange
    again = Partial(out, JOURNAL, resume=True, overwrite=True)
    assert again.finished == can_exchange
    assert (out / "config.json").read_text() == ("new" if can_exchange else "old")
    assert (tmp_path / "out.partial").exists() != can_exchange


def test_what_appears_at_out_meanwhile_costs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConversionError, match="out exists.*then repeat with --resume"), Partial(out, JOURNAL) as partial:
        (partial.folder / JOURNAL).write_text("{}")
        checkpoint(out, "another")
        partial.give_name(checkpoint(partial.folder / "result", "ours"))
    assert (out / "config.json").read_text() == "another"
    assert (tmp_path / "out.partial" / "result" / "config.json").read_text() == "ours"


# A resumed conversion


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` of 4 layers, its tokens, the fold of an uninterrupted run in `whole`, and `out.partial` behind layer 2."""
    root = tmp_path_factory.mktemp("begun")
    save_model(root / "source", "llama", num_hidden_layers=4, max_shard_size="100KB")
    save_tokens(root / "tokens.safetensors", 8, 32)
    assert fold(root, root / "whole")[0] == 0
    finish = CheckpointWriter.finish

    def killed(writer: CheckpointWriter, unit: str, record: dict[str, Any]) -> None:
        finish(writer, unit, record)
        if unit == "layer 2":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CheckpointWriter, "finish", killed)
        code, text = fold(root, root / "out")
    assert (code, text) == (130, "kvfold: stopped by SIGINT: what is finished is kept, repeat with --resume to go on\n")
    return root


def fold(root: Path, out: Path, *flags: Any) -> tuple[int, str]:
    tokens = f"{root}/tokens.safetensors:calibration"
    heal = ("--calibrate", tokens, "--heal-steps", 3, "--heal-window", 2, "--heal-batch-tokens", 64)
    return last_line(
        "convert", root / "source", out, "--to", "gqa", "--kv-heads", 2, *heal, "--max-shard-size", "100KB", *flags
    )


def last_line(*args: Any) -> tuple[int, str]:
    """What `invoke` gives, without what stands above it: how long it will take."""
    code, text = invoke(*args)
    return code, text.splitlines(keepends=True)[-1]


def without_timings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = files(folder)
    record = json.loads(found["kvfold.json"])
    for timed in (record, *record["layers"]):
        timed.pop("seconds")
    record.pop("peak_memory_bytes")
    return {**found, "kvfold.json": record}


def edit(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def zero_layer_0(partial: Path) -> None:
    """As a power cut leaves blocks that the disk had not got yet."""
    file = next(f for f in sorted(partial.glob("model-*")) if b"layers.0.self_attn.k_proj" in f.read_bytes())
    header = int.from_bytes(file.read_bytes()[:8], "little")
    begin, end = json.loads(file.read_bytes()[8 : 8 + header])["model.layers.0.self_attn.k_proj.weight"]["data_offsets"]
    edit(file, lambda raw: raw[: 8 + header + begin] + bytes(end - begin) + raw[8 + header + end :])


def link_weights(partial: Path) -> None:
    file = sorted(partial.glob("model-*"))[0]
    shutil.copyfile(file, partial.parent / "victim")
    file.unlink()
    file.symlink_to(partial.parent / "victim")


def claim_layer_3(partial: Path) -> None:
    with (partial / JOURNAL).open("a") as file:
        file.write('{"unit": "layer 3", "record": {"choice": "x"}}\n')


DAMAGES: dict[str, tuple[Callable[[Path], Any], int]] = {
    "nothing": (lambda partial: None, 3),
    "layer zeroed": (zero_layer_0, 0),
    "header zeroed": (lambda partial: edit(sorted(partial.glob("model-*"))[0], lambda raw: bytes(64) + raw[64:]), 3),
    "weights gone": (lambda partial: [f.unlink() for f in partial.glob("model-*")], 0),
    "weights a link": (link_weights, 3),
    "journal line torn": (lambda partial: edit(partial / JOURNAL, lambda raw: raw[:-9]), 2),
    "journal line in the middle": (lambda partial: edit(partial / JOURNAL, lambda raw: raw.replace(b'"layer 1"', b'"lay')), 0),
    "journal line invented": (claim_layer_3, 3),
    "last waiting layers": (lambda partial: edit(partial / "waiting-behind-2.safetensors", lambda raw: raw[:-99]), 2),
    "all waiting layers gone": (lambda partial: [f.unlink() for f in partial.glob("waiting-*")], 0),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_match_its_checksum_is_done_again(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Damaged state gives the files of an uninterrupted run, from no more work than is lost."""
    damage, kept = DAMAGES[name]
    shutil.copytree(begun / "out.partial", tmp_path / "out.partial")
    damage(tmp_path / "out.partial")
    believed: list[int] = []
    make = CheckpointWriter.__init__

    def noted(writer: CheckpointWriter, *args: Any) -> None:
        make(writer, *args)
        believed.append(len(writer.finished))

    monkeypatch.setattr(CheckpointWriter, "__init__", noted)
    assert fold(begun, tmp_path / "out", "--resume")[0] == 0
    assert believed == [kept]
    assert without_timings(tmp_path / "out") == without_timings(begun / "whole")
    assert {p.name for p in tmp_path.iterdir()} <= {"out", "victim"}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b'{"job": [1]}\n', b"5\n", b"{}\n"])
def test_a_journal_that_does_not_say_its_job_is_refused(begun: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(begun / "out.partial", tmp_path / "out.partial")
    (tmp_path / "out.partial" / JOURNAL).write_bytes(content)
    code, text = fold(begun, tmp_path / "out", "--resume")
    assert code == 2
    assert f"{JOURNAL} is damaged: start anew with --overwrite in place of --resume" in text


def test_what_is_finished_was_asked_for_so(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill behind the last rename leaves a whole checkpoint, which a resume with other settings does not pass for its own."""

    def killed(_: Partial) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    for flags, (code, words) in (((), (0, "numbers per token")), (("--seed", 1), (2, "begun with other settings (seed)"))):
        with monkeypatch.context() as patched:
            patched.setattr(Partial, "discard", killed)
            assert fold(begun, out, "--overwrite")[0] == 130
        before = files(out)
        got, text = fold(begun, out, "--resume", *flags)
        assert (got, words in text) == (code, True), text
        assert files(out) == before


def negate(file: Path) -> None:
    save_file({name: -t if t.is_floating_point() else t.flip(0) for name, t in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("model-00001", "with other source files (model-00001-of-"),
        ("config", "with other source files (config.json)"),
        ("tokens", "with another calibration text"),
        ("header", "with other source files (model-00001-of-"),
        ("flags", "with other settings (heal_window, seed)"),
    ],
)
def test_resume_refuses_a_changed_source_and_says_what_changed(begun: Path, tmp_path: Path, changed: str, words: str) -> None:
    root = tmp_path / "root"
    shutil.copytree(begun, root, ignore=shutil.ignore_patterns("whole"))  # copytree keeps the times of files
    edit(root / "out.partial" / JOURNAL, lambda raw: raw.replace(str(begun).encode(), str(root).encode()))
    source = root / "source"
    flags: tuple[Any, ...] = ()
    if changed == "config":
        edit(source / "config.json", lambda raw: raw.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 0.01'))
    elif changed == "tokens":
        negate(root / "tokens.safetensors")
    elif changed == "flags":
        flags = ("--seed", 1, "--heal-window", 1)
    else:
        file = next(source.glob("model-00001*"))
        times = file.stat()
        if changed == "header":  # with the old size and time
            edit(file, lambda raw: raw.replace(b'"format":"pt"', b'"format":"np"'))
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        else:
            negate(file)
    before = files(root / "out.partial")
    code, text = fold(root, root / "out", "--resume", *flags)
    assert code == 2
    assert words in text
    assert "or start anew with --overwrite in place of --resume" in text
    before.pop(LOCK)
    assert {name: raw for name, raw in files(root / "out.partial").items() if name != LOCK} == before


# Signals and what the system refuses


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("convert", "what is finished is kept, repeat with --resume to go on"),
        ("uptrain", "repeat with --resume to go on from the last checkpoint"),
        ("evaluate", "repeat the command to go on behind the models that are measured"),
        ("gguf", "repeat the command"),
    ],
)
def test_a_signal_says_how_to_go_on(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, verb: str, words: str
) -> None:
    tokens = f"{begun}/tokens.safetensors:calibration"
    step = {
        "convert": ("kvfold.convert.pipeline.fold_alone", ["convert", begun / "source", tmp_path / "out", "--to", "mqa"]),
        "uptrain": ("kvfold.recipes.uptrain.open_folded", ["uptrain", begun / "whole", tmp_path / "out", "--data", tokens]),
        "evaluate": ("kvfold.evaluation.evaluate.evaluate", ["evaluate", begun / "whole", "--on", tokens]),
        "gguf": ("kvfold.convert.publishing.gguf.write_gguf", ["gguf", begun / "whole", tmp_path / "out.gguf"]),
    }[verb]
    monkeypatch.setattr(step[0], lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    assert last_line(*step[1]) == (code, f"kvfold: stopped by {number.name}: {words}\n")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device; free some of the disk; then repeat with --resume"),
        (errno.EDQUOT, "Disk quota exceeded; free some of the disk; then repeat with --resume"),
        (errno.EIO, "Input/output error; check the path, its permissions and the disk; then repeat with --resume"),
    ],
)
@pytest.mark.parametrize("step", ["write", "keep"])
def test_what_the_system_refuses_is_named_truly(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, words: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, step, refuse)
        assert fold(begun, tmp_path / "out") == (1, f"kvfold: {tmp_path / 'out.partial'}: {words}\n")
    assert fold(begun, tmp_path / "out", "--resume")[0] == 0
    assert without_timings(tmp_path / "out") == without_timings(begun / "whole")


def test_weights_of_zeros_are_folded_to_zeros(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    save_file({name: t * 0 for name, t in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    assert invoke("convert", source, tmp_path / "out", "--to", "mqa")[0] == 0
    assert not any(tensor.any() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())


def test_a_report_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.json"
    write_whole(report, "old")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(report, "new" * 10_000)
    assert files(tmp_path) == {"report.json": b"old"}


# kill -9


@pytest.mark.parametrize(("healed", "least"), [(False, 40), (True, 100)], ids=["alone", "healed as a whole"])
def test_kill_before_any_file_operation_leaves_the_old_or_the_new_and_resume_gives_the_new(
    tmp_path: Path, healed: bool, least: int
) -> None:
    """A conversion over an older one, killed before each operation on its files in turn: tests/kill_everywhere.py."""
    source = save_model(tmp_path / "source", "llama", max_shard_size="100KB")
    tokens = [save_tokens(tmp_path / "tokens.safetensors", 8, 32)] if healed else []
    script = Path(__file__).parent / "kill_everywhere.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(source), str(tmp_path / "work"), *tokens]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert result["killed"] > least
    assert (result["again"] > least // 2) == healed


@pytest.mark.parametrize("change", [lambda raw: raw.replace(b"1.5", b"2.5"), lambda raw: b"[" * 10**5, lambda raw: b"\xff"])
def test_kept_results_are_believed_with_their_checksum_only(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    kept = Unfinished(tmp_path)
    kept.results["key"] = {"model": {"nll": 1.5, "positions": {8: float("inf")}}}
    kept.write()
    assert Unfinished(tmp_path).results == {"key": {"model": {"nll": 1.5, "positions": {"8": float("inf")}}}}
    edit(tmp_path / PARTIAL, change)
    assert Unfinished(tmp_path).results == {}
