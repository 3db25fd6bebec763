"""What is known: families, those that are one under another name, and models that have one in them."""

from typing import Any

from kvfold.convert.families import FAMILIES, Family
from kvfold.convert.families.views import RENAMED
from kvfold.convert.families.wrappers import PARTS, WRAPPERS
from kvfold.convert.planning.parts import STAYING
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import TARGETS, ConvertSettings
from kvfold.errors import UserError


def known() -> dict[str, list[dict[str, Any]]]:
    """As JSON data: `families` with the layout that each target is written in, `translations` with the family that each is
    read as, and `parts` with the targets that leave the whole model as it is."""
    return {
        "families": [
            {"model_type": f.model_type, "architecture": f.architecture, "targets": _targets(f)} for f in FAMILIES.values()
        ],
        "translations": [{"model_type": t.model_type, "architecture": t.architecture, "read_as": t.into} for t in RENAMED],
        "parts": [
            *({"model_type": w.model_type, "whole": list(STAYING) if w.stays else []} for w in WRAPPERS.values()),
            *({"model_type": t.model_type, "whole": []} for t in PARTS),
        ],
    }


def _targets(family: Family) -> dict[str, str]:
    """Target → the layout of a model whose config leaves all to its class's defaults; those that are refused left out."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family.model_type]().to_dict()
    found = {}
    for target in TARGETS:
        share = None if target in ("mqa", "source") else "100%" if target == "gqa" else "50%"
        try:
            plan = make_plan(config, ConvertSettings(to=target, kv_budget=share))
            plan.refuse()
            found[target] = plan.layout
        except UserError:
            continue
    return found
