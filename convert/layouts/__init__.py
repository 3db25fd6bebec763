"""How a design is written into a checkpoint: config, tensor names and shapes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:  # `modeling_kvfold` is imported wherever transformers is, and needs none of these
    import torch
    from torch import Tensor

    from kvfold.convert.planning.conversion_plan import ConversionPlan
    from kvfold.convert.source.checkpoint import CheckpointReader, TensorSpec


class Layout(Protocol):
    """What every module of this folder offers."""

    def config(self, source: dict[str, Any], plan: ConversionPlan, dtype: torch.dtype | None) -> dict[str, Any]:
        """The target's config.json."""

    def tensor_specs(self, reader: CheckpointReader, plan: ConversionPlan, dtype: torch.dtype | None) -> list[TensorSpec]:
        """Every tensor of the target."""

    def tensors(self, weights: Any, layer: int, plan: ConversionPlan) -> dict[str, Tensor]:
        """A layer's attention as the target stores it, by name."""

    def lift(self, tensors: dict[str, Tensor], plan: ConversionPlan) -> Any:
        """The inverse of `tensors`."""

    def names(self, layer: int, plan: ConversionPlan) -> list[str]:
        """The names of `tensors`."""

    def origin(self, name: str, plan: ConversionPlan) -> tuple[str, float]:
        """Where a tensor outside of attention comes from: the source's tensor, and the factor on it."""

    def files(self) -> dict[str, str]:
        """What a checkpoint needs beside weights and config, by name."""

    def code(self) -> dict[str, str]:
        """`auto_map` of the target's config.json, empty where transformers has its classes."""


def layout_of(plan: ConversionPlan) -> Layout:
    """The module of this folder that the plan names."""
    return cast(Layout, import_module(f"{__name__}.{plan.layout}"))
