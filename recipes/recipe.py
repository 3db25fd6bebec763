"""Recipes: YAML files that say how to uptrain, the shipped ones by name."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kvfold.convert.settings import parse_settings, parse_yaml, unknown
from kvfold.errors import UserError

SHIPPED = Path(__file__).parent / "configs"


def _rate(value: Any) -> Any:
    if value == "auto" or (isinstance(value, (int, float)) and 0 < value < math.inf):
        return value
    raise ValueError("write a finite number above 0, or auto")


class Recipe(BaseModel):
    """Everything that decides what an uptraining does. Recorded in kvfold.json.

    Attributes:
        train: what learns. `lora`: low-rank adapters on the new attention's projections, and in full those that an adapter
            would not make smaller; `attention`: the new attention in full; `full`: every parameter.
        norms: train the model's norms along.
        lora_rank: rank of the adapters.
        kl_weight, ce_weight: of the two losses, both in nats per token: KL(teacher ‖ student) and cross-entropy.
        top_k: compare only the teacher's k most likely tokens and the rest as one; None compares all.
        learning_rate: Adam's step relative to the root mean square of each parameter, as in healing; `auto` measures it.
        schedule: what becomes of it behind the warm-up: it falls to zero along a cosine, or stays.
        warmup: share of the steps over which it rises.
        max_grad_norm: the gradient of a step is shortened to this norm.
        tokens: to train on in all, repetitions included.
        window: tokens in a window of text. Rows of token files keep their own length.
        batch: windows in an optimizer step, over all processes.
        micro_batch: windows in a forward pass of one process.
        eval_tokens: held-out tokens, taken off the data where no text is given for them.
        eval_every: steps between evaluations, each of which saves a checkpoint.
        log_every: steps between lines of the log.
        bf16: matrix products in bfloat16.
        gradient_checkpointing: keep only the layers' inputs and compute the rest twice.
    """

    model_config = ConfigDict(extra="forbid")

    train: Literal["lora", "attention", "full"]
    norms: bool = True
    lora_rank: int = Field(16, ge=1)
    kl_weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    ce_weight: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    learning_rate: Annotated[float | Literal["auto"], BeforeValidator(_rate)]
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    tokens: int = Field(1_000_000, gt=0)
    window: int = Field(512, ge=2)
    batch: int = Field(4, ge=1)
    micro_batch: int = Field(4, ge=1)
    eval_tokens: int = Field(16384, gt=0)
    eval_every: int = Field(100, ge=1)
    log_every: int = Field(10, ge=1)
    bf16: bool = True
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)


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
