"""What a resumed uptraining believes of what an interrupted one left."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kvfold.convert.output.partial import Partial
from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.errors import ConversionError, Stopped, UserError
from kvfold.recipes import uptrain as module
from kvfold.recipes.recipe import load_recipe
from kvfold.recipes.uptrain import uptrain
from tests.helpers import invoke, save_model, save_tokens

SETTINGS = ["tokens=1024", "batch=4", "micro_batch=4", "eval_every=2", "eval_tokens=256", "log_every=1", "bf16=false"]
SETTINGS += ["learning_rate=0.01"]
"""8 steps of four windows of 32 ids, a checkpoint every other step."""


def run(root: Path, name: str, **more: Any) -> dict[str, Any]:
    recipe = load_recipe("distill-attention", SETTINGS)
    return uptrain(str(root / "fold"), root / name, None, recipe, f"{root}/tokens.safetensors:calibration", **more)


def stop_at_step_7(line: str) -> None:
    if line.startswith("step 6/") and " loss" in line:  # behind its loss comes step 7, and there it stops
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, fold and tokens, the result of an uninterrupted run in `whole`, and `out.partial` with two checkpoints."""
    root = tmp_path_factory.mktemp("begun")
    save_tokens(root / "tokens.safetensors", 64, 32)
    source = save_model(root / "source", "llama", initializer_range=0.2)
    convert(str(source), root / "fold", ConvertSettings(to="gqa", kv_heads=2))
    run(root, "whole")
    with pytest.raises(Stopped):
        run(root, "out", log=stop_at_step_7)
    assert sorted(p.name for p in (root / "out.partial").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]
    return root


def uptrained(folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((folder / "kvfold.json").read_text())["uptraining"][-1]
    return {key: entry[key] for key in ("held_out", "curve", "best_step")}


@pytest.fixture
def copied(begun: Path) -> Any:
    """`begun`, its partial folder and files as they were before and after."""
    kept = begun / "kept"
    names = ("out.partial", "fold", "source", "tokens.safetensors")
    kept.mkdir()
    for name in names:
        copy = shutil.copytree if (begun / name).is_dir() else shutil.copy2
        copy(begun / name, kept / name)
    yield begun
    for name in (*names, "out"):
        shutil.rmtree(begun / name) if (begun / name).is_dir() else (begun / name).unlink(missing_ok=True)
    for name in names:
        os.rename(kept / name, begun / name)
    kept.rmdir()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def all_but_the_first(partial: Path) -> None:
    for checkpoint in partial.glob("checkpoint-*"):
        (checkpoint / "trained.safetensors").write_bytes(b"garbage")


@pytest.mark.parametrize(
    ("damage", "step"),
    [
        (lambda partial: truncate(partial / "checkpoint-7" / "optimizer.pt"), 6),
        (lambda partial: (partial / "checkpoint-7" / "rng_state.pth").unlink(), 6),
        (lambda partial: shutil.copytree(partial / "checkpoint-6", partial / "checkpoint-evil"), 7),
        (all_but_the_first, 0),
        (lambda partial: [truncate(file) for file in (partial / "data").glob("*.arrow")], 7),
        (lambda partial: (partial / "data" / "state.json").write_text("{"), 7),
    ],
    ids=["optimizer", "rng", "another name", "all", "data", "data state"],
)
def test_what_is_damaged_is_not_believed(copied: Path, damage: Callable[[Path], Any], step: int) -> None:
    """It goes on from the last checkpoint that is whole, to the same losses and weights."""
    damage(copied / "out.partial")
    assert run(copied, "out", resume=True)["resumed_from_step"] == step
    assert uptrained(copied / "out") == uptrained(copied / "whole")
    assert (copied / "out" / "model.safetensors").read_bytes() == (copied / "whole" / "model.safetensors").read_bytes()
    assert not (copied / "out.partial").exists()


def negate(file: Path) -> None:
    save_file({name: -t if t.is_floating_point() else t.flip(0) for name, t in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("fold/model.safetensors", "with other checkpoint files (model.safetensors)"),
        ("source/model.safetensors", "with other teacher files (model.safetensors)"),
        ("tokens.safetensors", "with other text ("),
    ],
)
def test_resume_refuses_what_changed_and_says_what(copied: Path, changed: str, words: str) -> None:
    negate(copied / changed)
    with pytest.raises(UserError) as refused:
        run(copied, "out", resume=True)
    assert words in str(refused.value)
    assert (copied / "out.partial" / "checkpoint-7").exists()


@pytest.mark.parametrize("content", [b"", b"[1]", b"[" * 100_000, b'{"job": 5}'])
def test_a_damaged_run_file_is_refused(copied: Path, content: bytes) -> None:
    (copied / "out.partial" / "run.json").write_bytes(content)
    with pytest.raises(UserError, match="run.json is damaged: start anew with --overwrite in place of --resume"):
        run(copied, "out", resume=True)


def test_killed_while_packing_it_can_be_resumed(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        pack(*args)
        raise KeyboardInterrupt

    pack = module.pack
    out = tmp_path / "out"
    argv = ["uptrain", copied / "fold", out, "--recipe", "distill-attention", *SETTINGS]
    argv += ["--data", f"{copied}/tokens.safetensors:calibration"]
    # as kill -9 does
    monkeypatch.setattr("kvfold.convert.output.partial.Partial._leave", lambda partial: partial._lock.close())
    with monkeypatch.context() as patched:
        patched.setattr(module, "pack", killed)
        assert invoke(*argv)[0] == 130
    assert (tmp_path / "out.partial" / "data").exists()
    assert invoke(*argv, "--resume")[0] == 0
    assert uptrained(out) == uptrained(copied / "whole")


def test_a_full_disk_is_told_in_one_line(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with monkeypatch.context() as patched:
        patched.setattr("torch.save", full)
        with pytest.raises(ConversionError, match=r"saving a checkpoint .* with [\d,]+ bytes free there \(Pyt.*--resume"):
            run(copied, "full")
    assert run(copied, "full", resume=True)["resumed_from_step"] == 0
    assert uptrained(copied / "full") == uptrained(copied / "whole")


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_finished_was_asked_for_so(copied: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A kill behind the last rename leaves a whole checkpoint, which a resume with other settings does not pass for its own."""

    discard = Partial.discard

    def killed(partial: Partial) -> None:
        if partial.out.name == "out":  # the folder in it is written in the same way
            raise KeyboardInterrupt
        discard(partial)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Partial, "discard", killed)
        run(copied, "out", resume=True)
    assert uptrained(copied / "out") == uptrained(copied / "whole")
    how = str(copied / "fold"), copied / "out", None, load_recipe("distill-attention", [*SETTINGS, f"seed={seed}"])
    if seed:
        with pytest.raises(UserError, match=r"begun with other settings \(seed\)"):
            uptrain(*how, f"{copied}/tokens.safetensors:calibration", resume=True)
    else:
        assert uptrain(*how, f"{copied}/tokens.safetensors:calibration", resume=True)["steps"] == 8
