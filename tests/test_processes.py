"""Conversions on several processes: what one process comes to, and one line where they cannot go on."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM

import kvfold
from kvfold.convert import calibration, folding, heal_whole
from kvfold.convert.output.record import RECORD
from kvfold.convert.source.checkpoint import read_json
from tests.helpers import invoke, save_model, save_tokens

MLA = (
    "--to",
    "mla",
    "--kv-budget",
    "12.5%",
    "--heal-dtype",
    "float32",
    "--window",
    32,
    "--layout",
    "kvfold",
    "--device",
    "cpu",
)
WINDOWS = (*MLA, "--heal-steps", 6, "--heal-batch-tokens", 96, "--heal-window", 2)
WHOLE = (*MLA, "--heal-steps", 20, "--heal-batch-tokens", 320, "--heal-window", "all", "--heal-lr", 0.02)
WHOLE = (*WHOLE, "--calibration-tokens", 61 * 32, "--token-weights", "nll", "--layer-budgets", "measured")
Meddle = Callable[[int], None]
FORKS: Any = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["kvfold.convert.pipeline", "tests.helpers", "transformers.models.llama.modeling_llama"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source, text, and what one process makes of them: `windows` and `whole`."""
    made = tmp_path_factory.mktemp("processes")
    save_model(made / "source", "llama", num_hidden_layers=3)
    save_tokens(made / "t.safetensors", 101, 32)
    assert convert(made, "windows", *WINDOWS)[0] == convert(made, "whole", *WHOLE)[0] == 0
    return made


def convert(folder: Path, out: str, *options: Any) -> tuple[int, str]:
    return invoke("convert", folder / "source", folder / out, "--calibrate", folder / "t.safetensors:calibration", *options)


def one_of(number: int, count: int, port: int, results: Any, meddle: Meddle | None, arguments: Sequence[Any]) -> None:
    """What runs in one process of several, in an environment as torchrun makes it."""
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    numbers = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in {**where, **numbers}.items()})
    if meddle is not None:
        meddle(number)
    results.put((number, *invoke(*arguments)))


def together(count: int, folder: Path, out: str, *options: Any, meddle: Meddle | None = None) -> dict[int, tuple[int, str]]:
    """`convert` on so many processes: the exit code and the line of each; of one that was killed nothing."""
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    results = FORKS.SimpleQueue()
    calibrate = ("--calibrate", f"{folder}/t.safetensors:calibration")
    arguments = ("convert", folder / "source", folder / out, *calibrate, *options)
    started = [FORKS.Process(target=one_of, args=(n, count, store.port, results, meddle, arguments)) for n in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
    found = {}
    while not results.empty():
        number, *rest = results.get()
        found[number] = tuple(rest)
    return found


def divergence(folder: Path, out: str) -> float:
    """KL of the next token from the source."""
    ids = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("source", out)]
        ours, theirs = (model(ids).logits.log_softmax(-1) for model in models)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def assert_same(folder: Path, one: str, several: str) -> None:
    """The same choices and the same damage, and healing that was worth it."""
    ours, theirs = (read_json(folder / name / RECORD)["layers"] for name in (one, several))
    for mine, other in zip(ours, theirs, strict=True):
        assert other["choice"] == mine["choice"]
        assert other["block_error"] == pytest.approx(mine["block_error"], rel=1e-5)
        healed, wanted = (each.get("window_error") or each["output_kl"] for each in (other, mine))
        assert wanted["after"] < wanted["before"]
        assert healed == pytest.approx(wanted, rel=1e-4)
    assert divergence(folder, several) == pytest.approx(divergence(folder, one), rel=1e-4)


def test_launched_by_accelerate_two_come_to_what_one_does(folder: Path) -> None:
    options = ("--calibrate", f"{folder}/t.safetensors:calibration", *WINDOWS)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "kvfold", "convert"]
    command += [str(folder / "source"), str(folder / "two"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("numbers per token") == done.stderr.count("this will take about") == 1
    assert_same(folder, "windows", "two")
    assert not (folder / "two.partial").exists()


def test_two_heal_the_whole_model_as_one_does(folder: Path) -> None:
    """With unequal shares, also in a step, text that is only healed on, and widths measured per layer."""
    assert together(2, folder, "whole-two", *WHOLE)[0][0] == 0
    assert_same(folder, "whole", "whole-two")


def fitting_on_fewer(number: int) -> None:
    calibration.FITTED = 8


def test_of_which_tokens_the_output_is_fitted_on_two_have_those_of_one(folder: Path) -> None:
    """A sixth of them: windows begin with another token each, by their numbers among all."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calibration, "FITTED", 8)
        assert convert(folder, "fewer", *MLA, "--heal-steps", 0)[0] == 0
    assert together(2, folder, "fewer-two", *MLA, "--heal-steps", 0, meddle=fitting_on_fewer)[0][0] == 0
    ours, theirs = (read_json(folder / name / RECORD)["layers"] for name in ("fewer", "fewer-two"))
    for mine, other in zip(ours, theirs, strict=True):
        assert other["choice"] == mine["choice"]
        assert other["block_error"] == pytest.approx(mine["block_error"], rel=1e-5)


def killed(number: int) -> None:
    """Process 1 dies behind the first layer."""
    fold = folding.best

    def once(plan: Any, seen: Any, layer: int) -> Any:
        if layer == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return fold(plan, seen, layer)

    if number == 1:
        folding.best = once


def failing(number: int) -> None:
    """Process 1 fails in the middle of healing, with what the system says."""

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device", "/scratch")

    heal = heal_whole.heal
    if number == 1:
        heal_whole.heal = lambda *args, **more: heal(*args, **{**more, "report": fail})


@pytest.mark.parametrize(
    ("meddle", "options", "said"), [(killed, WINDOWS, "was killed"), (failing, WHOLE, "process 1 stopped")]
)
def test_what_stops_one_stops_all_and_one_goes_on(folder: Path, meddle: Meddle, options: tuple[Any, ...], said: str) -> None:
    out = f"stopped-{meddle.__name__}"
    code, text = together(2, folder, out, *options, meddle=meddle)[0]
    line = text.splitlines()[-1]
    assert code == 1
    assert said in line and "--resume" in line and "kvfold" not in text.replace(line, "")
    assert ("No space left on device" in line) == (meddle is failing)
    assert not (folder / out).exists()
    units = (folder / f"{out}.partial" / "journal.jsonl").read_text().count('"unit"')
    assert units == (1 if meddle is killed else 3)
    assert convert(folder, out, *options, "--resume")[0] == 0
    assert_same(folder, "windows" if meddle is killed else "whole", out)


def newer(number: int) -> None:
    kvfold.__version__ = f"9.9.{number}"


def elsewhere(number: int) -> None:
    """The same names, and another text behind one of them."""
    folder = Path.cwd() / f"text-{number}"
    folder.mkdir(exist_ok=True)
    save_tokens(folder / "t.safetensors", 25, 32, seed=number)
    os.chdir(folder)


@pytest.mark.parametrize(
    ("meddle", "count", "options", "said"),
    [
        (newer, 2, (), "process 1 has another version than process 0"),
        (elsewhere, 2, ("--calibrate", "t.safetensors:calibration"), "process 1 has another calibration text than process 0"),
        (None, 3, ("--calibration-tokens", 64), "3 processes and 2 windows"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meddle: Meddle, count: int, options: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = together(count, folder, "refused", *WINDOWS, *options, meddle=meddle)
    for number in range(count):
        code, line = found[number]
        assert code == 2 and said in line and line.count("\n") == 1
    assert not list(folder.glob("refused*"))
