"""What stands in the way where a source is a part of a larger model, or is to be translated and no more."""

from typing import Any

from kvfold.convert.families.views import PART_OF, WHOLE
from kvfold.convert.planning.settings import ConvertSettings

STAYING = ("gqa", "mqa", "source")
"""Targets that are written in the source's own class, which a larger model takes as it took the source."""


def stays_within(config: dict[str, Any], settings: ConvertSettings) -> bool:
    """Whether the model that the source is a part of is written whole."""
    return bool(config.get(WHOLE)) and settings.part == "all" and settings.to in STAYING


def refuse_part(config: dict[str, Any], settings: ConvertSettings, refusals: list[str]) -> None:
    whole = config.get(PART_OF)
    alone = "--part language writes its language model alone"
    if whole is None and settings.part == "language":
        refusals.append("--part language belongs to models of several parts, and this is a language model: leave it out")
    elif whole is not None and settings.part == "all" and not config.get(WHOLE):
        refusals.append(f"{whole} is a model of several parts, of which kvfold knows the language model only: {alone}")
    elif whole is not None and settings.part == "all" and settings.to not in STAYING:
        refusals.append(f"{whole} is a model of several parts, whose class has no {settings.to}: use --to gqa, or {alone}")


def refuse_folding(settings: ConvertSettings, refusals: list[str]) -> None:
    """`--to source` folds nothing."""
    for name in ("kv_budget", "calibrate", "method"):
        if settings.to == "source" and getattr(settings, name) is not None:
            refusals.append(f"--{name.replace('_', '-')} belongs to folding, and --to source folds nothing: leave it out")
