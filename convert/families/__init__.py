"""Source families as data, in known.py."""

from typing import Any

from kvfold.convert.families.base import Family
from kvfold.convert.families.known import FAMILIES, VARIANTS
from kvfold.convert.families.spec import AttentionSpec, Rope
from kvfold.convert.families.unknown import describe
from kvfold.errors import UserError

__all__ = ["FAMILIES", "AttentionSpec", "Family", "Rope", "family_of"]


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError with what stands in the way, and the known ones."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        variants = (family for (name, key), family in VARIANTS.items() if name == model_type and config.get(key))
        return next(variants, FAMILIES[model_type])
    raise UserError(describe(config, list(FAMILIES)))
