"""What is known: families, those that are one under another name, and models that have one in them."""

from typing import Any

from kvfold.convert.families import FAMILIES, Family
from kvfold.convert.families.views import RENAMED
from kvfold.convert.families.wrappers import PARTS, WRAPPERS
from kvfold.convert.planning.engines import deepseek_v3_obstacles
from kvfold.convert.planning.parts import STAYING
from kvfold.convert.planning.settings import LATENT_TARGETS, TARGETS, ConvertSettings
from kvfold.convert.source.config import resolve, silent


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
    """Target → the layout of a model whose config leaves all to its class's defaults."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with silent():
        config = CONFIG_MAPPING[family.model_type]().to_dict()
    obstacles = deepseek_v3_obstacles(resolve(config), family.spec(config), ConvertSettings(to="mla"))
    found = dict.fromkeys(TARGETS, "source")
    found |= dict.fromkeys(LATENT_TARGETS, "kvfold")
    if not obstacles:
        found["mla"] = "deepseek_v3"
    return {target: layout for target, layout in found.items() if family.grouped or target not in ("gqa", "mqa")}
