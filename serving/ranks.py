"""Tensor parallelism of folded layers: heads are split over ranks, and what writes the latent is on every rank. Torch alone."""

from typing import Any

import torch
from torch import Tensor

BY_HEADS = {"q_proj": 0, "q_b_proj": 0, "q_maps": 0, "q_norm": 0, "k_norm": 0, "sizing_proj": 0, "sinks": 0}
BY_HEADS |= {"kv_b_proj": 0, "k_b_proj": 0, "v_b_proj": 0, "turned_keys": 1, "o_proj": 1}
"""Parameters of the designs that go by heads, and along which axis."""


def unsplit(layers: list[dict[str, Any] | None], ranks: int) -> str | None:
    """Why the heads of these layers cannot be split over so many ranks; None if they can."""
    for widths in layers:
        counts = {"query heads": widths["heads"]} if widths else {}
        if widths and (grouped := widths.get("kv_heads") or (widths.get("norm") or {}).get("kv_heads")):
            counts["key heads"] = grouped
        for name, count in counts.items():
            if count % ranks:
                fitting = [str(n) for n in range(1, count + 1) if all(c % n == 0 for c in counts.values())]
                return f"--tensor-parallel-size {ranks} does not divide {count} {name}; {', '.join(fitting)} do"
    return None


def local(widths: dict[str, Any], ranks: int) -> dict[str, Any]:
    """What a design is made with on one of so many ranks."""
    made = {name: value // ranks if name in ("heads", "kv_heads") else value for name, value in widths.items()}
    return {**made, "norm": local(widths["norm"], ranks)} if widths.get("norm") else made


def share(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's part of a design's parameter, by its name within the design."""
    if name == "o_proj.bias":
        return tensor if rank == 0 else torch.zeros_like(tensor)  # the ranks' outputs are summed
    part = name.split(".")[0]
    return tensor.chunk(ranks, BY_HEADS[part])[rank] if part in BY_HEADS else tensor
