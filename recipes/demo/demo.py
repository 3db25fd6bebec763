"""`kvfold demo`: the whole tool on the shipped model, from conversion to report.html."""

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.errors import NothingGained, UserError
from kvfold.evaluation import report as reports
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.recipes.demo.corpus import CALIBRATION, HELDOUT, standard_library
from kvfold.recipes.recipe import load_recipe
from kvfold.recipes.uptrain import uptrain

MODEL = Path(__file__).parent / "model"
CALIBRATION_TOKENS, EVALUATION_TOKENS, HEAL_STEPS = 32768, 16384, 40
PIECE = 4096
"""Characters in a piece of text."""
FOLDS: dict[str, dict[str, Any]] = {
    "gqa-4-mean": {"to": "gqa", "kv_heads": 4, "method": "mean"},
    "gqa-4": {"to": "gqa", "kv_heads": 4, "heal_steps": 0},
    "gqa-4-healed": {"to": "gqa", "kv_heads": 4},
    "gqa-2": {"to": "gqa", "kv_heads": 2, "heal_steps": 0},
    "gqa-2-healed": {"to": "gqa", "kv_heads": 2},
    "mqa": {"to": "mqa", "heal_steps": 0},
    "mqa-healed": {"to": "mqa"},
    "mla-25": {"to": "mla", "kv_budget": "25%", "heal_steps": 0},
    "mla-25-healed": {"to": "mla", "kv_budget": "25%"},
    "mfa-25": {"to": "mfa", "kv_budget": "25%", "heal_steps": 0},
    "mfa-25-healed": {"to": "mfa", "kv_budget": "25%"},
    "mfa-kr-12": {"to": "mfa-kr", "kv_budget": "12.5%", "heal_steps": 0},
    "mfa-kr-12-healed": {"to": "mfa-kr", "kv_budget": "12.5%"},
    "mfa-kr-6": {"to": "mfa-kr", "kv_budget": "6.25%", "heal_steps": 0},
    "mfa-kr-6-healed": {"to": "mfa-kr", "kv_budget": "6.25%"},
}
UPTRAINED = ("gqa-2", "mla-25", "mfa-25", "mfa-kr-12")
"""Folds whose healed checkpoint is uptrained too."""
RECIPE, OVERRIDES = "distill-attention", ["tokens=65536", "eval_tokens=4096", "learning_rate=0.003"]


def run_demo(directory: Path, report: Callable[[float, str], None] = lambda share, line: None) -> dict[str, Any]:
    """Fold the demo model in every way of `FOLDS`, uptrain some, evaluate all, and write the report into `directory`.

    Calibration and uptraining text are modules of the standard library that the model was trained on, evaluation text are
    modules it has never seen. The model is copied to `directory/source`. What an earlier run left there is replaced.

    Returns:
        The result of `evaluate`.

    Raises:
        UserError: `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name a folder for the demo")
    directory.mkdir(parents=True, exist_ok=True)
    source = shutil.copytree(MODEL, directory / "source", dirs_exist_ok=True)
    calibration, heldout = write_texts(directory)
    share = 0.8 / (len(FOLDS) + len(UPTRAINED))
    names: list[str] = []
    for name, choice in FOLDS.items():
        settings, begun = ConvertSettings(**demo_settings(choice, calibration)), len(names)

        def progress(done: float | None, line: str, begun: int = begun, name: str = name) -> None:
            if done is not None:  # one fold's time tells little of the demo's
                report(share * (begun + done), f"{name}: {line}")

        convert(str(source), directory / name, settings, overwrite=True, report=progress)
        names.append(name)
        fold = name.removesuffix("-healed")
        if name != fold and fold in UPTRAINED:
            report(share * len(names), f"{fold}-uptrained")
            healed, out = str(directory / name), directory / f"{fold}-uptrained"
            with suppress(NothingGained):  # so few tokens need not gain anything
                uptrain(healed, out, str(source), load_recipe(RECIPE, OVERRIDES), str(calibration), overwrite=True)
                names.append(out.name)
    result = evaluate(
        [str(directory / name) for name in names],
        str(source),
        EvaluateSettings(on=str(heldout), max_tokens=EVALUATION_TOKENS, detail="quick"),
        lambda done, line: report(0.8 + 0.2 * done, f"evaluating {line}"),
    )
    reports.write(result, directory)
    return result


def demo_settings(choice: dict[str, Any], calibration: Path) -> dict[str, Any]:
    """A fold of the table, with the demo's smaller numbers where it names none."""
    defaults = {
        "calibrate": None if choice.get("method") == "mean" else str(calibration),
        "calibration_tokens": CALIBRATION_TOKENS,
        "heal_steps": HEAL_STEPS,
        "heal_batch_tokens": 2048,
    }
    return {**defaults, **choice}


def write_texts(directory: Path) -> tuple[Path, Path]:
    """Write the calibration and the held-out text, one folder of .py files each, and return the folders.

    Modules are cut into pieces and shuffled, so that the first tokens already come from all of them.
    """
    folders = directory / "calibration", directory / "heldout"
    for folder, modules in zip(folders, (CALIBRATION, HELDOUT), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        pieces = [text[i : i + PIECE] for text in standard_library(modules) for i in range(0, len(text), PIECE)]
        random.Random(0).shuffle(pieces)
        for number, text in enumerate(pieces):
            (folder / f"{number:04d}.py").write_text(text, encoding="utf-8")
    return folders
