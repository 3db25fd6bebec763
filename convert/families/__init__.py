"""Source families as data. To add one: write a file like `llama.py` and list it here and in tests/test_families.py."""

import difflib
from typing import Any

from kvfold.convert.families.base import AttentionSpec, Family, Rope
from kvfold.convert.families.llama import LLAMA
from kvfold.convert.families.mistral import MISTRAL
from kvfold.convert.families.qwen2 import QWEN2
from kvfold.errors import UserError

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2)}

__all__ = ["FAMILIES", "AttentionSpec", "Family", "Rope", "family_of"]


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises UserError with the known ones and the nearest name when it is unknown."""
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    close = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.3)
    hint = f" The nearest is {close[0]}." if close else ""
    raise UserError(
        f"model_type {model_type!r} is not a family kvfold knows.{hint} Known: {', '.join(FAMILIES)}; "
        "CONTRIBUTING.md shows how to add one"
    )
