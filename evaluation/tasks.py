"""Benchmarks of lm-eval (`--tasks`), with the model that is measured anyway."""

import difflib
import logging
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvfold.convert.source.data import load_tokenizer
from kvfold.errors import UserError

SEED = 0


def check(names: list[str], include_path: str | None) -> None:
    """Load the tasks and their data, so that what is wrong with them is told before anything is measured.

    Args:
        names: tasks, groups or tags as lm-eval knows them.
        include_path: folder with task files (YAML) of one's own.

    Raises:
        UserError: lm-eval is not installed, or a task is unknown, damaged, or cannot be had offline.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path} is no folder: name the one with your task files (.yaml)")
    if not names:
        return
    manager = _manager(include_path)
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            raise UserError(f"unknown task {name!r}: {hint} Task files of your own are found with --include-path FOLDER")
        try:
            manager.load([name])
        except Exception as error:  # of every kind: the Hub's client, datasets, and whatever a task file calls
            line = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"task {name} does not load ({line}): check the network or its task file; offline, define it on local data "
                "and give --include-path FOLDER"
            ) from None


def run(
    model: PreTrainedModel, folder: Path, names: list[str], include_path: str | None, limit: int | None, batch: int
) -> dict[str, Any]:
    """Each task's version, number of documents and metrics with their standard errors, as `schema.Task` has them."""
    if not names:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(include_path)
    done = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=batch),
        tasks=manager.match_tasks(names),
        task_manager=manager,
        limit=limit,
        log_samples=False,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    assert done is not None  # None comes from other processes than the first, and this is the only one
    found = {}
    for name, values in done["results"].items():
        metrics = {
            key.removesuffix(",none"): {"value": float(value), "stderr": _stderr(values, key)}
            for key, value in values.items()
            if isinstance(value, (int, float)) and "," in key and "_stderr" not in key
        }
        samples = done["n-samples"].get(name, {}).get("effective", 0)
        if metrics:  # a group without an aggregate of its own has none
            found[name] = {"version": str(done["versions"].get(name, "")), "samples": samples, "metrics": metrics}
    return found


def _stderr(values: dict[str, Any], key: str) -> float | None:
    metric, _, kind = key.partition(",")
    error = values.get(f"{metric}_stderr,{kind}")
    return float(error) if isinstance(error, (int, float)) else None


@cache
def _manager(include_path: str | None) -> Any:
    """lm-eval's index of tasks, which takes seconds to build."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("--tasks needs lm-eval, which is not installed: pip install 'kvfold[tasks]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # ours says what is done
    return TaskManager(include_path=include_path)
