"""The designs whose cache is one latent: MLA, MFA, MFA-KR and MLA with rebuilt keys, as modules with `forward(x, rope)`.

Shapes as in attention.py; `m` is the width of what queries read: `d`, or the rank of low-rank queries. The modules' parameters
carry the names under which a checkpoint of the `kvfold` layout stores them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.surgery.attention import AttentionWeights, GroupedAttention, Weights, causal_attention, linear, side_by_side
from kvfold.surgery.rope import Rope, pick, rotate


@dataclass(frozen=True)
class LatentWeights(Weights):
    """Multi-head latent attention (2405.04434), scores over √(N + R); with N = 0 it is MFA (2412.19255).

    `q_nope` (H, N, m), `q_rope` (H, R, m), `down` (r, d), `k_rope` (R, d), `up_k` (H, N, r), `up_v` (H, D, r), `o` (H, d, D);
    `pairs` (R/2,) the frequency of the source by which each pair of the rotary key turns, D/2 for none;
    `q_down` (m, d), `q_bias` (H, N + R), `kv_bias` (r + R,), `o_bias` (d,) or None.
    """

    q_nope: Tensor
    q_rope: Tensor
    down: Tensor
    k_rope: Tensor
    up_k: Tensor
    up_v: Tensor
    o: Tensor
    pairs: Tensor
    q_down: Tensor | None = None
    q_bias: Tensor | None = None
    kv_bias: Tensor | None = None
    o_bias: Tensor | None = None


class FoldedAttention(nn.Module):
    """What the designs share: `q_proj`, or `q_a_proj` and `q_b_proj` when queries are of low rank, and `o_proj`."""

    o_proj: nn.Linear
    value_dim: int

    def __init__(self, heads: Tensor, down: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.query_width = heads.shape[1]
        if down is None:
            self.q_proj = linear(heads.flatten(0, 1), bias)  # (H, E, m) → (H·E, m)
        else:
            self.q_a_proj, self.q_b_proj = linear(down, None), linear(heads.flatten(0, 1), bias)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, H, T, E)."""
        q = self.q_b_proj(self.q_a_proj(x)) if hasattr(self, "q_a_proj") else self.q_proj(x)
        return q.unflatten(-1, (-1, self.query_width)).transpose(1, 2)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """(B, T, d) → (B, T, d)."""
        return self.o_proj(self.mix(x, rope))

    def mix(self, x: Tensor, rope: Rope) -> Tensor:
        """The heads' outputs side by side, before `o_proj`: (B, T, d) → (B, T, H·D)."""
        raise NotImplementedError

    def query_heads(self) -> Tensor:
        """(H, E, m), detached."""
        last = self.q_b_proj if hasattr(self, "q_a_proj") else self.q_proj
        return last.weight.detach().unflatten(0, (-1, self.query_width))

    def shared_weights(self) -> dict[str, Any]:
        """Of the canonical form, what every design has beside its query heads, detached."""
        low_rank = hasattr(self, "q_a_proj")
        bias = detached((self.q_b_proj if low_rank else self.q_proj).bias)
        return {
            "q_down": self.q_a_proj.weight.detach() if low_rank else None,
            "q_bias": None if bias is None else bias.unflatten(0, (-1, self.query_width)),
            "o": self.o_proj.weight.detach().unflatten(1, (-1, self.value_dim)).permute(1, 0, 2),  # (d, H·D) → (H, d, D)
            "o_bias": detached(self.o_proj.bias),
        }


class LatentAttention(FoldedAttention):
    """MLA as DeepSeek-V3 lays it out, without its latent norm: what is cached is `kv_a_proj(x)`, r + R numbers per token."""

    rope_pairs: Tensor

    def __init__(self, weights: LatentWeights) -> None:
        super().__init__(torch.cat([weights.q_nope, weights.q_rope], 1), weights.q_down, weights.q_bias)
        self.nope, self.rope_dim = weights.q_nope.shape[1], weights.q_rope.shape[1]
        self.rank, self.value_dim = weights.up_v.shape[2], weights.up_v.shape[1]
        self.kv_a_proj = linear(torch.cat([weights.down, weights.k_rope]), weights.kv_bias)  # (r + R, d)
        self.kv_b_proj = linear(torch.cat([weights.up_k, weights.up_v], 1).flatten(0, 1), None)  # (H·(N + D), r)
        self.o_proj = output_projection(weights.o, weights.o_bias)
        self.register_buffer("rope_pairs", weights.pairs)

    def mix(self, x: Tensor, rope: Rope) -> Tensor:
        """(B, T, d) → (B, T, H·D)."""
        tables = pick(rope, self.rope_pairs)
        q_nope, q_rope = self.queries(x).split([self.nope, self.rope_dim], dim=-1)  # (B, H, T, N), (B, H, T, R)
        latent, key = self.kv_a_proj(x).split([self.rank, self.rope_dim], dim=-1)
        # Through the modules, not their matrices: adapters and sharding wrap them.
        expanded = self.kv_b_proj(latent).unflatten(-1, (-1, self.nope + self.value_dim)).transpose(1, 2)
        k, v = expanded.split([self.nope, self.value_dim], dim=-1)  # (B, H, T, N), (B, H, T, D)
        q_rope, key = (rotate(part, tables).to(v) for part in (q_rope, key[:, None]))
        k = torch.cat([k, key.expand(-1, k.shape[1], -1, -1)], dim=-1)
        return side_by_side(causal_attention(torch.cat([q_nope, q_rope], dim=-1), k, v))

    def weights(self) -> LatentWeights:
        """The canonical form of the current parameters, detached: the inverse of the constructor."""
        heads = self.query_heads()
        down, k_rope = self.kv_a_proj.weight.detach().split([self.rank, self.rope_dim])
        up = self.kv_b_proj.weight.detach().unflatten(0, (-1, self.nope + self.value_dim))
        return LatentWeights(
            q_nope=heads[:, : self.nope],
            q_rope=heads[:, self.nope :],
            down=down,
            k_rope=k_rope,
            up_k=up[:, : self.nope],
            up_v=up[:, self.nope :],
            pairs=self.rope_pairs,
            kv_bias=detached(self.kv_a_proj.bias),
            **self.shared_weights(),
        )


@dataclass(frozen=True)
class ReusedKeyWeights(Weights):
    """MFA-KR (2412.19255): one wide key that also serves as value, `v = (I + diag(α) N) k`, scores over √C.

    The key is cached before its rotation, and turned when it is read. `q` (H, C, m), `key` (C, d), `pairs` (C/2,) as in
    `LatentWeights`, `reuse` N (C, C), `alpha` (C,), `up_v` (H, D, C), `o` (H, d, D); `q_down` (m, d), `q_bias` (H, C),
    `k_bias` (C,), `o_bias` (d,) or None.
    """

    q: Tensor
    key: Tensor
    pairs: Tensor
    reuse: Tensor
    alpha: Tensor
    up_v: Tensor
    o: Tensor
    q_down: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    o_bias: Tensor | None = None


class ReusedKeyAttention(FoldedAttention):
    """MFA-KR: what is cached is `k_proj(x)`, C numbers per token."""

    rope_pairs: Tensor

    def __init__(self, weights: ReusedKeyWeights) -> None:
        super().__init__(weights.q, weights.q_down, weights.q_bias)
        self.value_dim = weights.up_v.shape[1]
        self.k_proj = linear(weights.key, weights.k_bias)  # (C, d)
        self.reuse_proj = linear(weights.reuse, None)  # (C, C)
        self.alpha = nn.Parameter(weights.alpha)
        self.v_b_proj = linear(weights.up_v.flatten(0, 1), None)  # (H·D, C)
        self.o_proj = output_projection(weights.o, weights.o_bias)
        self.register_buffer("rope_pairs", weights.pairs)

    def mix(self, x: Tensor, rope: Rope) -> Tensor:
        """(B, T, d) → (B, T, H·D)."""
        tables, key = pick(rope, self.rope_pairs), self.k_proj(x)  # (B, T, C)
        value = key + self.alpha.to(key) * self.reuse_proj(key)
        v = self.v_b_proj(value).unflatten(-1, (-1, self.value_dim)).transpose(1, 2)  # (B, H, T, D)
        q, k = (rotate(part, tables).to(v) for part in (self.queries(x), key[:, None]))
        return side_by_side(causal_attention(q, k.expand(-1, v.shape[1], -1, -1), v))

    def weights(self) -> ReusedKeyWeights:
        """The canonical form of the current parameters, detached: the inverse of the constructor."""
        return ReusedKeyWeights(
            q=self.query_heads(),
            key=self.k_proj.weight.detach(),
            pairs=self.rope_pairs,
            reuse=self.reuse_proj.weight.detach(),
            alpha=self.alpha.detach(),
            up_v=self.v_b_proj.weight.detach().unflatten(0, (-1, self.value_dim)),
            k_bias=detached(self.k_proj.bias),
            **self.shared_weights(),
        )


@dataclass(frozen=True)
class RebuiltKeyWeights(Weights):
    """A latent from which whole keys and values are rebuilt and then rotated, so that RoPE stays exact; scores over √D.

    `q` (H, D, m), `down` (r, d), `up_k` (G, D, r), `up_v` (G, D, r), `o` (H, d, D); `q_down` (m, d), `q_bias` (H, D),
    `kv_bias` (r,), `k_bias` (G, D), `o_bias` (d,) or None.
    """

    q: Tensor
    down: Tensor
    up_k: Tensor
    up_v: Tensor
    o: Tensor
    q_down: Tensor | None = None
    q_bias: Tensor | None = None
    kv_bias: Tensor | None = None
    k_bias: Tensor | None = None
    o_bias: Tensor | None = None


class RebuiltKeyAttention(FoldedAttention):
    """What is cached is `kv_a_proj(x)`, r numbers per token; every read rebuilds all keys, r·G·D products per token."""

    def __init__(self, weights: RebuiltKeyWeights) -> None:
        super().__init__(weights.q, weights.q_down, weights.q_bias)
        self.value_dim = weights.up_k.shape[1]
        self.kv_a_proj = linear(weights.down, weights.kv_bias)  # (r, d)
        self.k_b_proj = linear(weights.up_k.flatten(0, 1), weights.k_bias)  # (G·D, r)
        self.v_b_proj = linear(weights.up_v.flatten(0, 1), None)  # (G·D, r)
        self.o_proj = output_projection(weights.o, weights.o_bias)

    def mix(self, x: Tensor, rope: Rope) -> Tensor:
        """(B, T, d) → (B, T, H·D)."""
        latent = self.kv_a_proj(x)
        k, v = (proj(latent).unflatten(-1, (-1, self.value_dim)).transpose(1, 2) for proj in (self.k_b_proj, self.v_b_proj))
        return side_by_side(causal_attention(rotate(self.queries(x), rope).to(v), rotate(k, rope).to(v), v))

    def weights(self) -> RebuiltKeyWeights:
        """The canonical form of the current parameters, detached: the inverse of the constructor."""
        k_bias = detached(self.k_b_proj.bias)
        return RebuiltKeyWeights(
            q=self.query_heads(),
            down=self.kv_a_proj.weight.detach(),
            up_k=self.k_b_proj.weight.detach().unflatten(0, (-1, self.value_dim)),
            up_v=self.v_b_proj.weight.detach().unflatten(0, (-1, self.value_dim)),
            kv_bias=detached(self.kv_a_proj.bias),
            k_bias=None if k_bias is None else k_bias.unflatten(0, (-1, self.value_dim)),
            **self.shared_weights(),
        )


FoldedWeights = AttentionWeights | LatentWeights | ReusedKeyWeights | RebuiltKeyWeights
Design = GroupedAttention | LatentAttention | ReusedKeyAttention | RebuiltKeyAttention
WEIGHTS: dict[str, type[FoldedWeights]] = {
    kind.__name__: kind for kind in (AttentionWeights, LatentWeights, ReusedKeyWeights, RebuiltKeyWeights)
}


def design(weights: FoldedWeights) -> Design:
    """The module that runs these weights."""
    if isinstance(weights, LatentWeights):
        return LatentAttention(weights)
    if isinstance(weights, ReusedKeyWeights):
        return ReusedKeyAttention(weights)
    if isinstance(weights, RebuiltKeyWeights):
        return RebuiltKeyAttention(weights)
    return GroupedAttention(weights)


def output_projection(o: Tensor, bias: Tensor | None) -> nn.Linear:
    return linear(o.permute(1, 0, 2).flatten(1), bias)  # (H, d, D) → (d, H·D)


def detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
