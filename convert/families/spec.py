"""The geometry of a source's attention, as its config.json states it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what reads a config does without
    import torch


@dataclass(frozen=True)
class Rope:
    """Rotary embedding as the config states it: its type ("default", "llama3", "yarn", …), base and other parameters."""

    type: str
    theta: float
    parameters: dict[str, Any]

    def plain_pairs(self, head_dim: int) -> int:
        """How many pairs, from the fastest on, turn by `theta^(-2i/D)` exactly: none where the type changes them all.

        Type `llama3` leaves wavelengths below `original_max_position_embeddings / high_freq_factor` tokens as they are.
        """
        if self.type == "default":
            return head_dim // 2
        original, factor = (self.parameters.get(key) for key in ("original_max_position_embeddings", "high_freq_factor"))
        if self.type != "llama3" or not original or not factor:
            return 0
        return sum(2 * math.pi * self.theta ** (2 * i / head_dim) < original / factor for i in range(head_dim // 2))


@dataclass(frozen=True)
class AttentionSpec:
    """The geometry of a source's attention, the same in every layer but for windows and positions.

    Attributes:
        windows: tokens each layer looks back, None when all.
        turning: whether RoPE turns the queries and keys of each layer.
        rope: that of the layers which attend over everything, where kinds of layers differ in it.
        qkv_bias, o_bias: which projections carry a bias.
        norm_eps: eps of every norm.
        tied: the output embedding is the input embedding.
        key_norm: what of queries and keys an RMSNorm before their rotation takes: "" for none, "head" for each head by itself,
            "whole" for all of them together, "centred" for each head by itself and less its mean, with weights of its own;
            "behind" for each head by itself behind the rotation.
        score_scale: what scores are multiplied by, None for one over the root of the head width.
        score_cap: what soft-caps the scores behind that, by `cap · tanh(score / cap)`; None for nothing.
        sinks: whether each head has a score beside those of its keys, with nothing behind it.
        beside: what layers have beside attention that Llama's have not.
        rotary_dim: numbers of each head, from the first on, that RoPE turns.
        interleaved: the numbers of a pair stand side by side in a head, not half of `rotary_dim` apart.
        tables: how the model hands the angles to its attention, see `kvfold_attention.half_split`.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    rope: Rope
    windows: tuple[int | None, ...]
    turning: tuple[bool, ...]
    max_positions: int
    vocab_size: int
    tied: bool
    norm_eps: float
    rotary_dim: int
    key_norm: str = ""
    score_scale: float | None = None
    score_cap: float | None = None
    sinks: bool = False
    beside: str = ""
    interleaved: bool = False
    tables: str = "halves"

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers that attend over everything."""
        return tuple(layer for layer, window in enumerate(self.windows) if window is None)

    @property
    def mixed(self) -> bool:
        """Whether layers differ in their windows or in whether RoPE turns them."""
        return len(set(zip(self.windows, self.turning, strict=True))) > 1

    @property
    def sliding_window(self) -> int | None:
        """The narrowest window, None where there is none."""
        return min((window for window in self.windows if window is not None), default=None)

    def positions(self, layer: int) -> str:
        """How the attention of a layer reads the angles: `tables`, or "none" where RoPE does not turn it."""
        return self.tables if self.turning[layer] else "none"

    @property
    def key_scalars(self) -> int:
        """Numbers per token that a normed key's size takes."""
        return {"": 0, "head": self.kv_heads, "centred": self.kv_heads, "behind": self.kv_heads, "whole": 1}[self.key_norm]

    @property
    def cache_numbers(self) -> int:
        """Numbers cached per token per layer: 2·G·D."""
        return 2 * self.kv_heads * self.head_dim


def is_ordered(spec: AttentionSpec) -> bool:
    """Whether canonical heads have another order than stored ones."""
    return spec.interleaved or spec.rotary_dim < spec.head_dim


def halves_first(spec: AttentionSpec) -> torch.Tensor:
    """Where the numbers of a canonical head, half-split over its whole width, stand in a stored one, whose first ones turn."""
    import torch

    turning = torch.arange(spec.rotary_dim)
    halves = (turning[::2], turning[1::2]) if spec.interleaved else turning.chunk(2)
    still = torch.arange(spec.rotary_dim, spec.head_dim).chunk(2) if spec.rotary_dim < spec.head_dim else (turning[:0],) * 2
    return torch.cat([halves[0], still[0], halves[1], still[1]])
