"""The canonical form of one attention layer, and MHA, GQA and MQA as a module.

Shapes: `d` hidden size, `H` query heads, `G` key/value heads, `D` head width, `B` batch, `T` tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvfold.surgery.kvfold_attention import Attention, Rope, at, attend, inverse_size, per_head, rotate

Kind = TypeVar("Kind", bound="Weights")


@dataclass(frozen=True)
class Weights:
    """What the canonical forms share: they are tensors by name, some of which may be None.

    What scores go through before the softmax: `cap` () soft-caps them by `cap · tanh(score / cap)`, and `sinks` (H,) are scores
    that a head has beside those of its keys, with nothing behind them.
    """

    cap: Tensor | None = field(default=None, kw_only=True)
    sinks: Tensor | None = field(default=None, kw_only=True)

    @property
    def softmax(self) -> dict[str, Any]:
        """`cap` and `sinks` by name, for another form of the same layer."""
        return {"cap": self.cap, "sinks": self.sinks}

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def each(self: Kind, change: Callable[[Tensor], Tensor]) -> Kind:
        """The same with `change` of every tensor."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def to(self: Kind, *args: Any) -> Kind:
        """Every tensor through `Tensor.to`; integers keep their dtype."""
        return self.each(lambda tensor: _moved(tensor, *args))


@dataclass(frozen=True)
class AttentionWeights(Weights):
    """One RoPE attention layer. Query head `h` reads key/value head `h // (H // G)`.

    `q` (H, D, d), `k` (G, D, d), `v` (G, D, d), `o` (H, d, D); biases (H, D), (G, D), (G, D), (d,) or None.

    Where queries and keys go through an RMSNorm before they are rotated, `q_norm` and `k_norm` are its weights, (D,) for all
    heads or (H, D) and (G, D), and `norm` (3,) holds its eps, 1 where one size counts for all heads together, else 0, and 1
    where it stands behind their rotation, else 0.
    Scores are multiplied by `scale` (), 1/√D where it is None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm: Tensor | None = None
    scale: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[0]

    @property
    def head_dim(self) -> int:
        return self.k.shape[1]

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else float(self.scale)

    def rooted(self) -> "AttentionWeights":
        """The same with scores over √D."""
        if self.scale is None:
            return self
        factor = self.score_scale * self.head_dim**0.5
        names = ["q"] if self.q_norm is None else ["q_norm"]
        names += ["q_bias"] if self.q_norm is None and self.q_bias is not None else []
        changed: dict[str, Any] = {name: getattr(self, name) * factor for name in names}
        return replace(self, scale=None, **changed)

    def states(self, z: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Queries (H, T, D) and keys (G, T, D) as they meet, of augmented inputs (T, d + 1)."""
        # Of all heads in one product.
        q, k = (per_head(z[None] @ w.to(z).flatten(0, 1).mT, self.head_dim)[0] for w in self.augmented()[:2])
        return turned(q, rope, self.q_norm, self.norm), turned(k, rope, self.k_norm, self.norm)

    def augmented(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v with their biases as a last input column, for the input `[x; 1]`: (·, D, d + 1)."""

        def join(weight: Tensor, bias: Tensor | None) -> Tensor:
            column = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
            return torch.cat([weight, column[..., None]], dim=-1)

        return join(self.q, self.q_bias), join(self.k, self.k_bias), join(self.v, self.v_bias)

    def o_bias_with(self, values: Tensor) -> Tensor:
        """The output's bias when every value head gains a constant (G, D): attention weights sum to one → (d,)."""
        constant = torch.einsum("hdi,hi->d", self.o, values.repeat_interleave(self.heads // self.kv_heads, 0))
        return constant if self.o_bias is None else self.o_bias + constant

    def with_augmented(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> "AttentionWeights":
        """These q, k, v (·, D, d + 1), `o`, and biases where this layer has them (they must be zero where it has not)."""
        return replace(
            self,
            q=q[..., :-1],
            k=k[..., :-1],
            v=v[..., :-1],
            o=o,
            q_bias=None if self.q_bias is None else q[..., -1],
            k_bias=None if self.k_bias is None else k[..., -1],
            v_bias=None if self.v_bias is None else v[..., -1],
        )


class GroupedAttention(Attention):
    """MHA, GQA (2305.13245) and MQA (1911.02150): attention of H query heads over G key/value heads, without a cache.

    Parameters carry the names of transformers' Llama attention.
    """

    def __init__(self, weights: AttentionWeights) -> None:
        super().__init__()
        self.head_dim, self.scale, self.norm = weights.head_dim, weights.score_scale, weights.norm
        self.given_scale, self.cap = weights.scale, weights.cap
        self.sinks = None if weights.sinks is None else nn.Parameter(weights.sinks)
        if weights.q_norm is not None and weights.k_norm is not None:
            self.q_norm, self.k_norm = nn.Parameter(weights.q_norm), nn.Parameter(weights.k_norm)
        self.q_proj = linear(weights.q.flatten(0, 1), weights.q_bias)  # (H·D, d)
        self.k_proj = linear(weights.k.flatten(0, 1), weights.k_bias)  # (G·D, d)
        self.v_proj = linear(weights.v.flatten(0, 1), weights.v_bias)  # (G·D, d)
        self.o_proj = linear(weights.o.permute(1, 0, 2).flatten(1), weights.o_bias)  # (H, d, D) → (d, H·D)

    def heads(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Any, asking: slice | None) -> Tensor:
        some = asking or slice(None)
        q, k, v = (per_head(proj, self.head_dim) for proj in (self.q_proj(x[:, some]), self.k_proj(x), self.v_proj(x)))
        q_norm, k_norm = (None, None) if self.norm is None else (self.q_norm, self.k_norm)
        q, k = turned(q, at(rope, some), q_norm, self.norm).to(v), turned(k, rope, k_norm, self.norm).to(v)
        mask = mask if mask is None else mask[..., some, :]
        cap = None if self.cap is None else float(self.cap)
        return attend(q, k, v, mask, self.scale, None, cap, self.sinks)

    def weights(self) -> AttentionWeights:
        """The canonical form of the current parameters, detached: the inverse of the constructor."""

        def heads(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else parameter.detach().unflatten(0, (-1, self.head_dim))

        o = self.o_proj.weight.detach().unflatten(1, (-1, self.head_dim)).permute(1, 0, 2)  # (d, H·D) → (H, d, D)
        return AttentionWeights(
            q=self.q_proj.weight.detach().unflatten(0, (-1, self.head_dim)),
            k=self.k_proj.weight.detach().unflatten(0, (-1, self.head_dim)),
            v=self.v_proj.weight.detach().unflatten(0, (-1, self.head_dim)),
            o=o,
            q_bias=heads(self.q_proj.bias),
            k_bias=heads(self.k_proj.bias),
            v_bias=heads(self.v_proj.bias),
            o_bias=None if self.o_proj.bias is None else self.o_proj.bias.detach(),
            q_norm=None if self.norm is None else self.q_norm.detach(),
            k_norm=None if self.norm is None else self.k_norm.detach(),
            norm=self.norm,
            scale=self.given_scale,
            cap=self.cap,
            sinks=None if self.sinks is None else self.sinks.detach(),
        )


def normed(states: Tensor, weight: Tensor, norm: Tensor | None) -> Tensor:
    """The RMSNorm of `AttentionWeights` on (..., heads, T, D)."""
    assert norm is not None
    return states * inverse_size(states, *told(norm)).to(states) * weight.to(states).unsqueeze(-2)


def turned(states: Tensor, rope: Rope, weight: Tensor | None, norm: Tensor | None) -> Tensor:
    """Queries or keys (..., heads, T, D) rotated to their positions, and through their norm where there is one."""
    if weight is None or norm is None:
        return rotate(states, rope)
    return normed(rotate(states, rope), weight, norm) if norm[2] else rotate(normed(states, weight, norm), rope)


def told(norm: Tensor) -> tuple[float, bool]:
    """Its eps, and whether one size counts for all heads together."""
    return float(norm[0]), bool(norm[1])


def _moved(tensor: Tensor, *args: Any) -> Tensor:
    moved = tensor.to(*args)
    return moved if tensor.is_floating_point() else moved.to(tensor.dtype)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.flatten().contiguous())
    return linear
