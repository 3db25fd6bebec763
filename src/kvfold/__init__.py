"""kvfold folds the KV cache of a trained Hugging Face model into a cheaper attention.

Public API: `convert_checkpoint`, `ConvertSettings`, `make_plan`, `evaluate`, `uptrain`, `load_recipe`, and the errors.
Everything heavy is imported on first use. Checkpoints of our own layout load without `trust_remote_code` from here on, whether
transformers was imported before or is afterwards.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvfold.errors import ConversionError, UserError

if TYPE_CHECKING:
    from kvfold.convert.pipeline import convert as convert_checkpoint
    from kvfold.convert.planning.plan import make_plan
    from kvfold.convert.planning.settings import ConvertSettings
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
    "ConvertSettings": ("kvfold.convert.planning.settings", "ConvertSettings"),
    "make_plan": ("kvfold.convert.planning.plan", "make_plan"),
    "evaluate": ("kvfold.evaluation.evaluate", "evaluate"),
    "load_recipe": ("kvfold.recipes.recipe", "load_recipe"),
    "uptrain": ("kvfold.recipes.uptrain", "uptrain"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


TABLE, MODELLING = "transformers.models.auto.modeling_auto", "kvfold.convert.layouts.modeling_kvfold"


class _Registering(MetaPathFinder):
    """Enters our model into transformers' table of models as soon as that is imported; importing it here would make every
    `kvfold --help` wait for seconds."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def and_register(module: ModuleType) -> None:
                execute(module)
                import_module(MODELLING)

            spec.loader.exec_module = and_register  # type: ignore[method-assign]
        return spec


if TABLE in sys.modules:
    import_module(MODELLING)
else:
    sys.meta_path.insert(0, _Registering())
