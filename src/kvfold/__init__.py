"""kvfold folds the KV cache of a trained Hugging Face model into a cheaper attention.

Public API: `convert_checkpoint`, `ConvertSettings`, `make_plan`, `evaluate`, `uptrain`, `load_recipe`, and the errors.
Everything heavy is imported on first use. Where transformers was imported before, checkpoints of our own layout load without
`trust_remote_code` from then on.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvfold.errors import ConversionError, UserError

if TYPE_CHECKING:
    from kvfold.convert.pipeline import convert as convert_checkpoint
    from kvfold.convert.plan import make_plan
    from kvfold.convert.settings import ConvertSettings
    from kvfold.evaluation.evaluate import evaluate
    from kvfold.recipes.recipe import load_recipe
    from kvfold.recipes.uptrain import uptrain

__version__ = "0.1.0"
__all__ = [
    "ConversionError",
    "ConvertSettings",
    "UserError",
    "__version__",
    "convert_checkpoint",
    "evaluate",
    "load_recipe",
    "make_plan",
    "uptrain",
]

_HOMES = {
    "convert_checkpoint": ("kvfold.convert.pipeline", "convert"),
    "ConvertSettings": ("kvfold.convert.settings", "ConvertSettings"),
    "make_plan": ("kvfold.convert.plan", "make_plan"),
    "evaluate": ("kvfold.evaluation.evaluate", "evaluate"),
    "load_recipe": ("kvfold.recipes.recipe", "load_recipe"),
    "uptrain": ("kvfold.recipes.uptrain", "uptrain"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


if "transformers" in sys.modules:  # importing it here would make every `kvfold --help` wait for seconds
    import_module("kvfold.convert.layouts.modeling_kvfold")
