"""The canonical form of one attention layer, and MHA, GQA and MQA as a module with `forward(x, rope)`.

Shapes: `d` hidden size, `H` query heads, `G` key/value heads, `D` head width, `B` batch, `T` tokens.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvfold.surgery.rope import Rope, rotate

Kind = TypeVar("Kind", bound="Weights")


@dataclass(frozen=True)
class Weights:
    """What the canonical forms share: they are tensors by name, some of which may be None."""

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def to(self: Kind, *args: Any) -> Kind:
        """Every tensor through `Tensor.to`; integers keep their dtype."""
        return replace(self, **{name: _moved(tensor, *args) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class AttentionWeights(Weights):
    """One RoPE attention layer. Query head `h` reads key/value head `h // (H // G)`.

    `q` (H, D, d), `k` (G, D, d), `v` (G, D, d), `o` (H, d, D); biases (H, D), (G, D), (G, D), (d,) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[0]

    @property
    def head_dim(self) -> int:
        return self.k.shape[1]

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


class GroupedAttention(nn.Module):
    """MHA, GQA (2305.13245) and MQA (1911.02150): causal attention of H query heads over G key/value heads.

    Parameters carry the names of transformers' Llama attention.
    """

    def __init__(self, weights: AttentionWeights) -> None:
        super().__init__()
        self.head_dim = weights.head_dim
        self.q_proj = linear(weights.q.flatten(0, 1), weights.q_bias)  # (H·D, d)
        self.k_proj = linear(weights.k.flatten(0, 1), weights.k_bias)  # (G·D, d)
        self.v_proj = linear(weights.v.flatten(0, 1), weights.v_bias)  # (G·D, d)
        self.o_proj = linear(weights.o.permute(1, 0, 2).flatten(1), weights.o_bias)  # (H, d, D) → (d, H·D)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        return self.o_proj(self.mix(x, rope))

    def mix(self, x: Tensor, rope: Rope) -> Tensor:
        """The heads' outputs side by side, before `o_proj`: (B, T, d) → (B, T, H·D)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return side_by_side(causal_attention(rotate(q, rope).to(v), rotate(k, rope).to(v), v))

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
        )


def side_by_side(heads: Tensor) -> Tensor:
    """(B, H, T, D) → (B, T, H·D)."""
    return heads.transpose(1, 2).flatten(2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, D) queries over (B, G, T, D) keys and (B, G, T, V) values → (B, H, T, V), scores over √D."""
    if not (q.requires_grad and q.device.type == "cpu"):
        widest = max(q.shape[-1], v.shape[-1])  # PyTorch's fused kernels take one width only
        scale, width = q.shape[-1] ** -0.5, v.shape[-1]
        q, k, v = (F.pad(part, (0, widest - part.shape[-1])) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)[..., :width]
    # Written out, because the backward pass of PyTorch's fused CPU kernel takes twice as long in bf16.
    tokens, width = q.shape[2:]
    grouped = (q * width**-0.5).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H/G·T, D)
    scores = (grouped @ k.mT).unflatten(2, (-1, tokens))  # (B, G, H/G, T, T)
    future = torch.full((tokens, tokens), -torch.inf, dtype=scores.dtype).triu(1)
    weights = (scores + future).softmax(-1).to(v.dtype)
    return (weights.flatten(2, 3) @ v).unflatten(2, (-1, tokens)).flatten(1, 2)


def _moved(tensor: Tensor, *args: Any) -> Tensor:
    moved = tensor.to(*args)
    return moved if tensor.is_floating_point() else moved.to(tensor.dtype)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.flatten().contiguous())
    return linear
