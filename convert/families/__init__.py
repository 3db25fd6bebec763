"""Source families as data. To add one: write a file like `llama.py` and list it here and in tests/test_families.py."""

from typing import Any

from kvfold.convert.families.base import AttentionSpec, Family, Rope
from kvfold.convert.families.llama import LLAMA
from kvfold.convert.families.mistral import MISTRAL
from kvfold.convert.families.qwen2 import QWEN2
from kvfold.convert.families.unknown import describe
from kvfold.errors import UserError

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2)}

__all__ = ["FAMILIES", "AttentionSpec", "Family", "Rope", "family_of"]


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError with what stands in the way, and the known ones."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UserError(describe(config, list(FAMILIES)))
