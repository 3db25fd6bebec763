"""The designs whose cache is one latent: the canonical forms of MLA, MFA, MFA-KR and MLA with rebuilt keys.

Shapes as in attention.py; `m` is the width of what queries read: `d`, or the rank of low-rank queries. The modules that run
them are those of kvfold_attention.py, whose parameters carry the names under which a checkpoint of the `kvfold` layout stores
them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.surgery.attention import AttentionWeights, GroupedAttention, Weights
from kvfold.surgery.kvfold_attention import FoldedAttention, LatentAttention, RebuiltKeyAttention, ReusedKeyAttention


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


FoldedWeights = AttentionWeights | LatentWeights | ReusedKeyWeights | RebuiltKeyWeights
Design = GroupedAttention | FoldedAttention
WEIGHTS: dict[str, type[FoldedWeights]] = {
    kind.__name__: kind for kind in (AttentionWeights, LatentWeights, ReusedKeyWeights, RebuiltKeyWeights)
}


def design(weights: FoldedWeights) -> Design:
    """The module that runs these weights."""
    if isinstance(weights, AttentionWeights):
        return GroupedAttention(weights)
    hidden, heads, value_dim = weights.o.shape[1], *weights.o.shape[::2]
    widths: dict[str, Any] = {
        "heads": heads,
        "value_dim": value_dim,
        "q_rank": None if weights.q_down is None else len(weights.q_down),
        "query_bias": weights.q_bias is not None,
        "output_bias": weights.o_bias is not None,
    }
    module: FoldedAttention
    with torch.device("meta"):
        if isinstance(weights, LatentWeights):
            widths |= {"rank": len(weights.down), "rope_dim": len(weights.k_rope), "nope_dim": weights.q_nope.shape[1]}
            module = LatentAttention(hidden, **widths, cache_bias=weights.kv_bias is not None)
        elif isinstance(weights, ReusedKeyWeights):
            widths |= {"rope_dim": len(weights.key)}
            module = ReusedKeyAttention(hidden, **widths, cache_bias=weights.k_bias is not None)
        else:
            widths |= {"rank": len(weights.down), "kv_heads": len(weights.up_k), "key_bias": weights.k_bias is not None}
            module = RebuiltKeyAttention(hidden, **widths, cache_bias=weights.kv_bias is not None)
    module.load_state_dict(_stored(weights), assign=True)
    return module


def _stored(weights: LatentWeights | ReusedKeyWeights | RebuiltKeyWeights) -> dict[str, Tensor]:
    """A module's parameters by name."""
    queries = torch.cat([weights.q_nope, weights.q_rope], 1) if isinstance(weights, LatentWeights) else weights.q
    last = "q_proj" if weights.q_down is None else "q_b_proj"
    held = {
        "q_a_proj.weight": weights.q_down,
        f"{last}.weight": queries.flatten(0, 1),  # (H, E, m) → (H·E, m)
        f"{last}.bias": None if weights.q_bias is None else weights.q_bias.flatten(),
        "o_proj.weight": weights.o.permute(1, 0, 2).flatten(1),  # (H, d, D) → (d, H·D)
        "o_proj.bias": weights.o_bias,
    }
    if isinstance(weights, LatentWeights):
        held |= {
            "kv_a_proj.weight": torch.cat([weights.down, weights.k_rope]),  # (r + R, d)
            "kv_a_proj.bias": weights.kv_bias,
            "kv_b_proj.weight": torch.cat([weights.up_k, weights.up_v], 1).flatten(0, 1),  # (H·(N + D), r)
            "rope_pairs": weights.pairs,
        }
    elif isinstance(weights, ReusedKeyWeights):
        held |= {
            "k_proj.weight": weights.key,
            "k_proj.bias": weights.k_bias,
            "reuse_proj.weight": weights.reuse,
            "alpha": weights.alpha,
            "v_b_proj.weight": weights.up_v.flatten(0, 1),  # (H·D, C)
            "rope_pairs": weights.pairs,
        }
    else:
        held |= {
            "kv_a_proj.weight": weights.down,
            "kv_a_proj.bias": weights.kv_bias,
            "k_b_proj.weight": weights.up_k.flatten(0, 1),  # (G·D, r)
            "k_b_proj.bias": None if weights.k_bias is None else weights.k_bias.flatten(),
            "v_b_proj.weight": weights.up_v.flatten(0, 1),
        }
    return {name: tensor.contiguous() for name, tensor in held.items() if tensor is not None}


def weights_of(module: nn.Module) -> FoldedWeights:
    """The canonical form of a module's current parameters, detached: the inverse of `design`."""
    if isinstance(module, GroupedAttention):
        return module.weights()
    assert isinstance(module, FoldedAttention)
    held = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    last, width = "q_b_proj" if "q_a_proj.weight" in held else "q_proj", module.value_dim
    queries, bias = held[f"{last}.weight"].unflatten(0, (-1, module.query_width)), held.get(f"{last}.bias")
    shared: dict[str, Any] = {
        "q_down": held.get("q_a_proj.weight"),
        "q_bias": None if bias is None else bias.unflatten(0, (-1, module.query_width)),
        "o": held["o_proj.weight"].unflatten(1, (-1, width)).permute(1, 0, 2),  # (d, H·D) → (H, d, D)
        "o_bias": held.get("o_proj.bias"),
    }
    if isinstance(module, LatentAttention):
        down, k_rope = held["kv_a_proj.weight"].split([module.rank, module.rope_dim])
        q_nope, q_rope = queries.split([module.nope, module.rope_dim], 1)
        up_k, up_v = held["kv_b_proj.weight"].unflatten(0, (-1, module.nope + width)).split([module.nope, width], 1)
        pairs, kv_bias = held["rope_pairs"], held.get("kv_a_proj.bias")
        return LatentWeights(q_nope, q_rope, down, k_rope, up_k, up_v, pairs=pairs, kv_bias=kv_bias, **shared)
    if isinstance(module, ReusedKeyAttention):
        return ReusedKeyWeights(
            queries,
            key=held["k_proj.weight"],
            pairs=held["rope_pairs"],
            reuse=held["reuse_proj.weight"],
            alpha=held["alpha"],
            up_v=held["v_b_proj.weight"].unflatten(0, (-1, width)),
            k_bias=held.get("k_proj.bias"),
            **shared,
        )
    k_bias = held.get("k_b_proj.bias")
    return RebuiltKeyWeights(
        queries,
        down=held["kv_a_proj.weight"],
        up_k=held["k_b_proj.weight"].unflatten(0, (-1, width)),
        up_v=held["v_b_proj.weight"].unflatten(0, (-1, width)),
        kv_bias=held.get("kv_a_proj.bias"),
        k_bias=None if k_bias is None else k_bias.unflatten(0, (-1, width)),
        **shared,
    )
