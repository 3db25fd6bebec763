"""`learning_rate: auto`: a few steps at each of several rates, all from the same beginning, and the least held-out loss wins.

What a rate does to held-out loss soon tells which are too large (the range test of 1506.01186); a long run may want less.
"""

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainingArguments

from kvfold.convert.output.files import write_whole
from kvfold.errors import ConversionError
from kvfold.recipes.trainer import Log, Uptrainer

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
STEPS = 16
FILE = "rates.json"
Tried = list[tuple[float, float]]
"""Rates and the held-out losses that they came to, infinite where a loss was not finite."""


class Trial(Uptrainer):
    """A short run at one rate, which keeps nothing. A rate that is far too large shows in its loss and is no error."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return Trainer.training_step(self, *args, **kwargs)


def shorten(args: TrainingArguments) -> None:
    """Make of a run's arguments those of a trial: its first steps, a warm-up over a quarter of them, no checkpoints."""
    args.max_steps = STEPS
    args.lr_scheduler_type, args.warmup_steps = "constant_with_warmup", STEPS // 4
    args.eval_strategy = args.save_strategy = args.logging_strategy = "no"


def try_rates(file: Path, trial: Callable[[float], Uptrainer], log: Log, keep: bool) -> Tried:
    """Try rates from small to large until one is worse than the one before.

    Args:
        file: where a run keeps what it tried; taken from there when it is resumed.
        trial: makes a trainer of the checkpoint that was given, for a rate.
        keep: write `file`, as one of several processes does.

    Raises:
        ConversionError: not one loss is finite.
    """
    if file.exists():
        return [(rate, loss) for rate, loss in json.loads(file.read_text())]
    tried: Tried = []
    for rate in RATES:
        trainer = trial(rate)
        trainer.train()
        assert trainer.state.best_metric is not None  # its last step was evaluated
        tried.append((rate, trainer.state.best_metric))
        log(f"learning_rate {rate:g}: held-out loss {tried[-1][1]:.4f} after {trainer.state.global_step} steps")
        del trainer
        gc.collect()  # a Trainer refers to itself, and holds a model
        if len(tried) > 1 and not tried[-1][1] <= tried[-2][1]:
            break
    if not any(math.isfinite(loss) for _, loss in tried):
        raise ConversionError(f"no loss is finite after {STEPS} steps, not even at learning_rate={RATES[0]:g}: try bf16=false")
    if keep:
        write_whole(file, json.dumps(tried))
    return tried


def best(tried: Tried) -> float:
    """The rate of least held-out loss."""
    return min(tried, key=lambda pair: pair[1])[0]
