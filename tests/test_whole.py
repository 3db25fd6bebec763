"""Healing of the whole model at once: it lowers the KL at the output, and goes on after an interruption to the same bytes."""

import itertools
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from kvfold.convert import heal_whole, heal_windows
from kvfold.convert.output.writer import CheckpointWriter
from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.surgery import healing
from tests.helpers import run_cli, save_model, save_tokens


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model(tmp_path / "source", "llama")


def settings(tmp_path: Path, **more: Any) -> ConvertSettings:
    tokens = save_tokens(tmp_path / "t.safetensors", 64, 32)
    fixed = {
        "to": "mla",
        "kv_budget": "12.5%",
        "heal_steps": 40,
        "heal_batch_tokens": 512,
        "layout": "kvfold",
        "heal_window": "all",
        "calibration_tokens": 48 * 32,  # the others are healed on alone
    }
    return ConvertSettings(**{**fixed, "calibrate": tokens, **more})


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_healing_at_the_output_lowers_its_kl(tmp_path: Path, source: Path) -> None:
    healed = convert(str(source), tmp_path / "out", settings(tmp_path, heal_lr=0.05)).record
    kl = healed["layers"][0]["output_kl"]
    assert 0 < kl["after"] < 0.9 * kl["before"]
    assert all(layer["output_kl"] == kl for layer in healed["layers"])


def test_text_behind_the_calibration_tokens_is_healed_on_and_nothing_else(tmp_path: Path, source: Path) -> None:
    def converted(name: str, rows: int) -> list[dict[str, Any]]:
        tokens = save_tokens(tmp_path / f"{rows}.safetensors", rows, 32)
        asked = settings(tmp_path, calibrate=tokens, calibration_tokens=64 * 32, heal_steps=8)
        return convert(str(source), tmp_path / name, asked).record["layers"]

    short, long = converted("short", 64), converted("long", 128)
    assert [layer["healed_on_tokens"] for layer in (short[0], long[0])] == [64 * 32, 128 * 32]
    for one, other in zip(short, long, strict=True):
        assert {key: one[key] for key in ("choice", "block_error")} == {key: other[key] for key in ("choice", "block_error")}
        assert one["output_kl"]["before"] == pytest.approx(other["output_kl"]["before"], rel=1e-6)  # the same held out
    assert weights(tmp_path / "short") != weights(tmp_path / "long")


def test_healing_ends_where_the_windows_held_out_lose(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def note(share: float | None, line: str) -> None:
        steps.extend([line] if line.startswith("healing") else [])

    def healed(name: str, losses: Iterable[float]) -> dict[str, Any]:
        """With these held-out losses in place of what they are, one of every three steps."""
        steps.clear()
        looked, behind = iter(losses), healing.Looks.behind
        with monkeypatch.context() as patched:
            patched.setattr(
                healing.Looks,
                "behind",
                lambda looks, step, steps, _, now: behind(looks, step, steps, lambda: next(looked), now),
            )
            kept = convert(str(source), tmp_path / name, settings(tmp_path, heal_steps=36), report=note).record
        return {**kept["layers"][0]["output_kl"], "before": 0}

    assert healed("worse", itertools.count(9.0)) == {"before": 0, "after": pytest.approx(0.1, abs=0.1), "step": 0}
    assert len(steps) == 18  # no more than half
    assert healed("best", [-1.0, -2.0, 0.0, -1.5, -3.0, 7.0, 7.0, 7.0]) == {"before": 0, "after": -3.0, "step": 15}
    assert len(steps) == 24
    coarse = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.1, -0.5]
    assert healed("coarse", coarse) == {"before": 0, "after": -0.5, "step": 36}
    assert len(steps) == 36
    assert weights(tmp_path / "best") != weights(tmp_path / "coarse")


def test_an_interrupted_healing_goes_on_to_the_same_bytes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(str(source), tmp_path / "whole", settings(tmp_path))
    monkeypatch.setattr(heal_whole, "KEEP_SECONDS", 0.0)

    def stop(share: float, line: str, at: list[int] = [0]) -> None:  # noqa: B006 — counts its calls
        at[0] += line.startswith("healing")
        if at[0] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(source), tmp_path / "out", settings(tmp_path), report=stop)
    kept = [path.name for path in (tmp_path / "out.partial").glob("healed-*")]
    assert "healed-6.pt" in kept
    assert len(kept) == 2  # the last, and in case of damage the one before
    convert(str(source), tmp_path / "out", settings(tmp_path), resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("*.pt"))


DESIGNS = {
    "gqa": {"to": "gqa", "kv_heads": 2, "kv_budget": None, "layout": "auto"},
    "mla stock": {"kv_budget": "50%", "layout": "deepseek_v3"},
    "mla biases": {"family": "qwen2", "q_rank": 24},
    "mla rebuilt": {"keys": "rebuilt", "kv_budget": "25%"},
    "mfa": {"to": "mfa", "layer_budgets": "measured"},
    "mfa-kr bfloat16": {"to": "mfa-kr", "dtype": "bfloat16", "token_weights": "nll"},
}


@pytest.mark.parametrize("name", DESIGNS)
def test_stopped_behind_every_unit_it_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each run resumes the one before, does one unit more, and is stopped; what it finds is as good as what it held."""
    design = dict(DESIGNS[name])
    source = str(save_model(tmp_path / "source", design.pop("family", "llama")))
    wanted = settings(tmp_path, **{"heal_steps": 3, **design})
    monkeypatch.setattr(heal_whole, "KEEP_SECONDS", 0.0)
    undisturbed = convert(source, tmp_path / "whole", wanted).record
    finish = CheckpointWriter.finish

    def stopped(writer: CheckpointWriter, unit: str, record: dict[str, Any]) -> None:
        finish(writer, unit, record)
        if unit == "healed 3":
            last, before = (writer.folder / f"healed-{step}.pt" for step in (3, 2))
            assert last.stat().st_size < before.stat().st_size / 2  # no optimizer is needed any more
            assert not (writer.folder / "healed-1.pt").exists()
        raise KeyboardInterrupt

    runs = 0
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "finish", stopped)
        while runs < 20:
            try:
                record = convert(source, tmp_path / "out", wanted, resume=True).record
                break
            except KeyboardInterrupt:
                runs += 1
    assert runs == 2 + 3 + 2  # layers folded, steps of healing, layers written
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    for ours, theirs in zip(record["layers"], undisturbed["layers"], strict=True):
        assert {**ours, "healing_seconds": 0} == {**theirs, "healing_seconds": 0}


@pytest.mark.parametrize(("damaged", "begun"), [("healed-2.pt", 1), ("healed-1.pt", 2), ("folded-1.safetensors", 0)])
def test_damage_costs_what_is_damaged(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, damaged: str, begun: int
) -> None:
    """Of a healing that was stopped behind its second step, from which step it goes on."""
    wanted = settings(tmp_path, heal_steps=3)
    monkeypatch.setattr(heal_whole, "KEEP_SECONDS", 0.0)
    convert(str(source), tmp_path / "whole", wanted)
    finish, heal = CheckpointWriter.finish, heal_whole.heal
    steps: list[int] = []

    def stopped(writer: CheckpointWriter, unit: str, record: dict[str, Any]) -> None:
        finish(writer, unit, record)
        if unit == "healed 2":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CheckpointWriter, "finish", stopped)
        convert(str(source), tmp_path / "out", wanted)
    file = tmp_path / "out.partial" / damaged
    file.write_bytes(file.read_bytes()[:-99] + bytes(99))

    def noted(*args: Any, **more: Any) -> Any:
        steps.append(more["begun"].steps if more["begun"] else 0)
        return heal(*args, **more)

    monkeypatch.setattr(heal_whole, "heal", noted)
    convert(str(source), tmp_path / "out", wanted, resume=True)
    assert steps == [begun]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_what_does_not_fit_is_healed_in_windows(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is so shallow that windows do better."""
    for name, shallow, free in (("small", 0, 1000), ("shallow", 2, 10**12), ("deep", 1, 10**12)):
        monkeypatch.setattr(heal_whole, "SHALLOW", shallow)
        monkeypatch.setattr(heal_whole, "free_bytes", lambda device, free=free: free)
        layers = convert(str(source), tmp_path / name, settings(tmp_path, heal_window="auto")).record["layers"]
        if name == "deep":
            assert "output_kl" in layers[0]
        else:
            assert all(layer["window_error"]["after"] <= layer["window_error"]["before"] for layer in layers)


def test_a_text_of_one_window_is_enough(tmp_path: Path, source: Path) -> None:
    record = convert(
        str(source), tmp_path / "out", settings(tmp_path, calibrate=save_tokens(tmp_path / "o.safetensors", 1, 32))
    )
    kl = record.record["layers"][0]["output_kl"]
    assert 0 < kl["after"] < kl["before"]


def test_the_command_alone_knows_our_layout(tmp_path: Path, source: Path) -> None:
    """In a process of its own, where nothing else has registered our layout with transformers."""
    tokens = save_tokens(tmp_path / "t.safetensors", 4, 32)
    shape = ("--to", "mla", "--kv-rank", 8, "--rope-dim", 4, "--layout", "kvfold", "--heal-steps", 0)
    ran = run_cli("convert", source, tmp_path / "out", *shape, "--calibrate", tokens)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "modeling_kvfold.py").exists()


@pytest.mark.parametrize("window", ["all", 2])
def test_it_says_at_the_start_how_long_it_will_take(tmp_path: Path, source: Path, window: str | int) -> None:
    """Behind the first layer, within a factor of five of what it then takes, however busy the machine."""
    said: list[tuple[float | None, str]] = []
    started = time.monotonic()
    asked = settings(tmp_path, heal_window=window, heal_steps=200, heal_batch_tokens=2048, heal_dtype="float32")
    convert(str(source), tmp_path / "out", asked, report=lambda share, line: said.append((share, line)), check=False)
    taken = time.monotonic() - started
    widths, repeated, duration = [line for share, line in said if share is None]
    assert widths.startswith("measuring widths will take about ")
    over = {"all": ("200 times over the 2,048", 32), 2: ("267 times over the 1,536", 24)}[window]
    assert repeated == f"healing goes {over[0]} tokens of calibration text: give more of it, or --heal-steps {over[1]}"
    (wanted,) = re.findall(r"^this will take about (\d+) s: folding \d+ s, healing \d+ s ", duration)
    assert taken / 5 < int(wanted) < 5 * taken
    shares = [share for share, _ in said if share is not None]
    assert shares == sorted(shares)


def test_the_help_tells_the_rates() -> None:
    told = ConvertSettings.model_fields["heal_lr"].description or ""
    assert f"{heal_whole.RATE}/√d for all layers, {heal_windows.WINDOW_RATE} for windows" in told
