"""Recipes: YAML files that say how to uptrain, the shipped ones by name."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from kvfold.convert.planning.settings import parse_settings, parse_yaml, setting, unknown
from kvfold.errors import UserError

SHIPPED = Path(__file__).parent / "configs"


def _rate(value: Any) -> Any:
    if value == "auto" or (isinstance(value, (int, float)) and 0 < value < math.inf):
        return value
    raise ValueError("write a finite number above 0, or auto")


LEARNING, STEPS, TEXT, RUNNING = "What learns", "Steps", "Text of the run", "Running"
"""Panels of `--help`."""


class Recipe(BaseModel):
    """Everything that decides what an uptraining does. Recorded in kvfold.json."""

    model_config = ConfigDict(extra="forbid")

    train: Literal["lora", "attention", "full"] = setting(
        ...,
        LEARNING,
        "lora: low-rank adapters on the new attention's projections, and in full those that an adapter would not make smaller; "
        "attention: the new attention in full; full: every parameter.",
    )
    norms: bool = setting(True, LEARNING, "Train the model's norms along.")
    lora_rank: int = setting(16, LEARNING, "Rank of the adapters.", ge=1)
    kl_weight: float = setting(
        1.0, LEARNING, "Of KL(teacher ‖ student) in the loss, in nats per token.", ge=0, allow_inf_nan=False
    )
    ce_weight: float = setting(0.0, LEARNING, "Of cross-entropy, the same.", ge=0, allow_inf_nan=False)
    top_k: int | None = setting(
        None, LEARNING, "Compare only the teacher's k most likely tokens and the rest as one. Default: all.", ge=1
    )
    learning_rate: Annotated[float | Literal["auto"], BeforeValidator(_rate)] = setting(
        ..., STEPS, "Adam's step relative to the root mean square of each parameter, as in healing; auto measures it."
    )
    schedule: Literal["cosine", "constant"] = setting(
        "cosine", STEPS, "What becomes of the rate behind the warm-up: it falls to zero along a cosine, or stays."
    )
    warmup: float = setting(0.05, STEPS, "Share of the steps over which it rises.", ge=0, lt=1, allow_inf_nan=False)
    max_grad_norm: float = setting(1.0, STEPS, "The gradient of a step is shortened to this norm.", gt=0, allow_inf_nan=False)
    tokens: int = setting(1_000_000, TEXT, "To train on in all, repetitions included.", gt=0)
    window: int = setting(512, TEXT, "Tokens in a window. Rows of token files keep their own length.", ge=2)
    batch: int = setting(4, STEPS, "Windows in an optimizer step, over all processes.", ge=1)
    micro_batch: int = setting(4, RUNNING, "Windows in a forward pass of one process.", ge=1)
    eval_tokens: int = setting(16384, TEXT, "Held-out tokens, taken off the data where no text is given for them.", gt=0)
    eval_every: int = setting(100, STEPS, "Steps between evaluations, each of which saves a checkpoint.", ge=1)
    log_every: int = setting(10, RUNNING, "Steps between lines of the log.", ge=1)
    bf16: bool = setting(True, RUNNING, "Matrix products in bfloat16.")
    gradient_checkpointing: bool = setting(False, RUNNING, "Keep only the layers' inputs and compute the rest twice.")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", RUNNING, "Where it runs.")
    seed: int = setting(0, RUNNING, "Of order and dropout.", ge=0, lt=2**32)


def shipped() -> dict[str, Path]:
    """The recipes that come with kvfold, name → file."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """The file of a shipped recipe, or `name` itself when it is a .yaml file. Raises UserError for anything else."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"recipe {name} does not exist: `kvfold recipes copy NAME` writes one to begin with")
        return Path(name)
    if name not in (known := shipped()):
        raise UserError(unknown("recipe", name, list(known)) + ", or a .yaml file")
    return known[name]


def headline(path: Path) -> str:
    """The first line of the comment that a recipe begins with."""
    return path.read_text().splitlines()[0].lstrip("# ")


def load_recipe(name: str, overrides: list[str]) -> Recipe:
    """Read a recipe and put `key=value` pairs over it.

    Raises:
        UserError: no such recipe, not YAML, a pair without `=`, and every unknown key or impossible value at once.
    """
    path = recipe_file(name)
    try:
        values = _yaml(path.read_text(encoding="utf-8"), f"recipe {path}")
    except ValueError as error:
        raise UserError(f"recipe {path} is no text ({error}): write `key: value` lines") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} holds no settings: write `key: value` lines")
    for pair in overrides:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise UserError(f"{pair!r} is no setting of a recipe: write key=value")
        values[key] = _yaml(value, pair)
    recipe = parse_settings(Recipe, values)
    if not recipe.kl_weight and not recipe.ce_weight:
        raise UserError("kl_weight and ce_weight are both 0: nothing would be learned; give one of them")
    if recipe.batch % recipe.micro_batch:
        raise UserError(f"batch={recipe.batch} is no multiple of micro_batch={recipe.micro_batch}: change one of them")
    return recipe


def _yaml(text: str, where: str) -> Any:
    value = parse_yaml(text, where)
    # YAML 1.1 takes 1e-2 for a string, and people write it
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return _number(value)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
