"""The designs whose cache is one latent: the canonical forms of MLA, MFA, MFA-KR and MLA with rebuilt keys.

Shapes as in attention.py; `m` is the width of what queries read: `d`, or the rank of low-rank queries, or `D` behind a norm.
Then `q_raw` (H, D, d) and `k_raw` (G, D, d), with their biases, are the source's queries and keys, whose sizes the norm takes,
and `norm` is that of `AttentionWeights`; without `k_raw` every key has the mean size. Behind RoPE `q_gains` (2, H, D) are what
the products of both norms' weights have in common for the two numbers of a pair, and the rest. Where keys are rebuilt, queries
and keys are the source's by themselves, and `q_norm` (H, D) and `k_norm` (G, D) the norms' weights.

The modules that run them are those of kvfold_attention.py, whose parameters carry the names under which a checkpoint of the
`kvfold` layout stores them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.surgery.attention import AttentionWeights, GroupedAttention, Weights, told
from kvfold.surgery.kvfold_attention import FoldedAttention, LatentAttention, RebuiltKeyAttention, ReusedKeyAttention


@dataclass(frozen=True)
class LatentWeights(Weights):
    """Multi-head latent attention (2405.04434), scores over √(N + R); with N = 0 it is MFA (2412.19255).

    `q_nope` (H, N, m), `q_rope` (H, R, m), `down` (r, d), `k_rope` (R, d), `up_k` (H, N, r), `up_v` (H, D, r), `o` (H, d, D);
    `pairs` (R/2,) the frequency of the source by which each pair of the rotary key turns, D/2 for none;
    `q_down` (m, d), `q_bias` (H, N + R), `kv_bias` (r + R,), `o_bias` (d,) or None; `turned` (J, H, N) or None, keys that turn
    whole: the constant, and one times each of the latent's first J - 1 numbers.
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
    q_raw: Tensor | None = None
    q_raw_bias: Tensor | None = None
    k_raw: Tensor | None = None
    k_raw_bias: Tensor | None = None
    norm: Tensor | None = None
    q_gains: Tensor | None = None
    kv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    turned: Tensor | None = None


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
    q_raw: Tensor | None = None
    q_raw_bias: Tensor | None = None
    k_raw: Tensor | None = None
    k_raw_bias: Tensor | None = None
    norm: Tensor | None = None
    q_gains: Tensor | None = None
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
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm: Tensor | None = None
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
        "norm": None,
        "output_bias": weights.o_bias is not None,
        "cap": None if weights.cap is None else float(weights.cap),
        "sinks": weights.sinks is not None,
    }
    if weights.norm is not None:
        raw = weights.up_k if isinstance(weights, RebuiltKeyWeights) else weights.k_raw
        (eps, together), kv_heads = told(weights.norm), 0 if raw is None else len(raw)
        widths["norm"] = {"kv_heads": kv_heads, "together": together, "eps": eps, "behind": bool(weights.norm[2])}
        if not isinstance(weights, RebuiltKeyWeights):
            widths["query_bias"] = weights.q_raw_bias is not None
    module: FoldedAttention
    with torch.device("meta"):
        if isinstance(weights, LatentWeights):
            widths |= {"rank": len(weights.down), "rope_dim": len(weights.k_rope), "nope_dim": weights.q_nope.shape[1]}
            widths |= {"turned": 0 if weights.turned is None else len(weights.turned)}
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
        f"{last}.bias": flat(weights.q_bias),
    }
    if isinstance(weights, RebuiltKeyWeights):
        held |= {"q_norm": weights.q_norm, "k_norm": weights.k_norm}
    elif weights.q_raw is not None:
        held = {
            "q_maps": queries,
            "q_norm": weights.q_gains,
            "q_proj.weight": weights.q_raw.flatten(0, 1),
            "q_proj.bias": flat(weights.q_raw_bias),
            "sizing_proj.weight": flat(weights.k_raw, 1),
            "sizing_proj.bias": flat(weights.k_raw_bias),
        }
    held |= {
        "o_proj.weight": weights.o.permute(1, 0, 2).flatten(1),  # (H, d, D) → (d, H·D)
        "o_proj.bias": weights.o_bias,
        "sinks": weights.sinks,
    }
    if isinstance(weights, LatentWeights):
        held |= {
            "kv_a_proj.weight": torch.cat([weights.down, weights.k_rope]),  # (r + R, d)
            "kv_a_proj.bias": weights.kv_bias,
            "kv_b_proj.weight": torch.cat([weights.up_k, weights.up_v], 1).flatten(0, 1),  # (H·(N + D), r)
            "rope_pairs": weights.pairs,
            "turned_keys": weights.turned,
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
            "k_b_proj.bias": flat(weights.k_bias),
            "v_b_proj.weight": weights.up_v.flatten(0, 1),
        }
    return {name: tensor.contiguous() for name, tensor in held.items() if tensor is not None}


def flat(tensor: Tensor | None, last: int = -1) -> Tensor | None:
    """(heads, rows, …) → (heads·rows, …)."""
    return None if tensor is None else tensor.flatten(0, last)


def cut(tensor: Tensor | None, width: int) -> Tensor | None:
    """The inverse of `flat`."""
    return None if tensor is None else tensor.unflatten(0, (-1, width))


def weights_of(module: nn.Module) -> FoldedWeights:
    """The canonical form of a module's current parameters, detached: the inverse of `design`."""
    if isinstance(module, GroupedAttention):
        return module.weights()
    assert isinstance(module, FoldedAttention)
    held = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    last, width = "q_b_proj" if "q_a_proj.weight" in held else "q_proj", module.value_dim
    shared: dict[str, Any] = {
        "q_down": held.get("q_a_proj.weight"),
        "q_bias": None if "q_maps" in held else cut(held.get(f"{last}.bias"), module.query_width),
        "o": held["o_proj.weight"].unflatten(1, (-1, width)).permute(1, 0, 2),  # (d, H·D) → (H, d, D)
        "o_bias": held.get("o_proj.bias"),
        "sinks": held.get("sinks"),
        "cap": None if module.cap is None else torch.tensor(module.cap, dtype=torch.float64),
    }
    if module.norm is not None:
        norm = module.norm["eps"], module.norm["together"], module.behind
        shared["norm"] = torch.tensor(norm, dtype=torch.float64)
    if "q_maps" in held:
        queries, shared["q_gains"] = held["q_maps"], held.get("q_norm")
        raw = {"q_raw": "q_proj.weight", "q_raw_bias": "q_proj.bias", "k_raw": "sizing_proj.weight"}
        shared |= {field: cut(held.get(name), width) for field, name in {**raw, "k_raw_bias": "sizing_proj.bias"}.items()}
    else:
        queries = held[f"{last}.weight"].unflatten(0, (-1, module.query_width))
    if isinstance(module, LatentAttention):
        down, k_rope = held["kv_a_proj.weight"].split([module.rank, module.rope_dim])
        q_nope, q_rope = queries.split([module.nope, module.rope_dim], 1)
        up_k, up_v = held["kv_b_proj.weight"].unflatten(0, (-1, module.nope + width)).split([module.nope, width], 1)
        pairs, kv_bias = held["rope_pairs"], held.get("kv_a_proj.bias")
        turned = held.get("turned_keys")
        return LatentWeights(q_nope, q_rope, down, k_rope, up_k, up_v, pairs=pairs, kv_bias=kv_bias, turned=turned, **shared)
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
    return RebuiltKeyWeights(
        queries,
        down=held["kv_a_proj.weight"],
        up_k=held["k_b_proj.weight"].unflatten(0, (-1, width)),
        up_v=held["v_b_proj.weight"].unflatten(0, (-1, width)),
        kv_bias=held.get("kv_a_proj.bias"),
        k_bias=cut(held.get("k_b_proj.bias"), width),
        q_norm=held.get("q_norm"),
        k_norm=held.get("k_norm"),
        **shared,
    )
