"""Attention whose cache is one latent: MLA, MFA and MFA-KR, and keys rebuilt from a latent.

This file needs torch alone. It travels with every checkpoint of the `kvfold` layout, and it is what kvfold itself folds into,
heals and trains. A module stands in the place of a transformers attention and is called as that is.

- `latent`: MLA (2405.04434) and, with `nope_dim` 0, MFA (2412.19255). Cached: `r + R` numbers per token, a latent and a shared
  rotary key. A few new tokens attend to the cache in the latent (absorbed), so decoding never expands the past. The first `J`
  numbers of the latent and a constant may also give keys as wide as the source's, which are turned when they are read.
- `reused-key`: MFA-KR (2412.19255). Cached: the key before its rotation, `C` numbers; it is turned when it is read.
- `rebuilt-key`: a latent of `r` numbers from which all keys and values are rebuilt at every step.

Where the source's queries and keys go through an RMSNorm, a normed key is a linear one times a scalar per token and key head.
The scalars are cached beside the latent and multiply the scores, so that the rest stays as it is; `norm` says of it

- `kv_heads`: key heads of the source, whose sizes are taken; 0 where every key has the mean size and no scalar is cached;
- `together`: whether one size counts for all heads, as in OLMo 2, or each has its own;
- `eps`: what is added to the mean square;
- `behind`: whether its weights stand behind RoPE, as in Hunyuan, where they may differ between the two numbers of a pair. Then
  `q_norm` holds what the weights of queries and keys have in common for both, which commutes with RoPE, and what they have not:
  a mirror image, so that what a query makes of it is turned backwards.

Shapes: B batch, T new tokens, S cached and new tokens, H query heads, G key heads, D head width, d hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rope = tuple[Tensor, Tensor]
"""`(cos, sin)`, each (T, D) or (B, T, D): the angles of both halves, as transformers' rotary modules return them."""


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate queries or keys (..., heads, T, D), half-split, to their positions."""
    cos, sin = (table.unsqueeze(-3) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def at(rope: Rope, tokens: slice) -> Rope:
    """The tables of some tokens."""
    cos, sin = (table[..., tokens, :] for table in rope)
    return cos, sin


def pick(rope: Rope, pairs: Tensor) -> Rope:
    """The tables of some frequencies, (..., D) → (..., 2·len(pairs)): `pairs` counts the source's, D/2 means no rotation."""
    cos, sin = (table[..., : table.shape[-1] // 2] for table in rope)
    still = torch.ones_like(cos[..., :1])
    cos, sin = (torch.cat([t, s], -1)[..., pairs] for t, s in ((cos, still), (sin, torch.zeros_like(still))))
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


POSITIONS = ("halves", "pairs", "once", "none")
"""How models have their tables of angles: see `half_split`."""


def moved(every: Rope, places: Rope, positions: Rope) -> Rope:
    """The tables `every` (1, S, D), moved as the last of `places` is to the last of `positions` (·, T, D): by as many tokens as
    are padding before a text."""
    (a, b), (c, d) = ([table[..., -1:, :] for table in rope] for rope in (places, positions))
    size = a.square() + b.square()
    cos, sin = (a * c + b * d) / size, (a * d - b * c) / size
    return every[0] * cos - every[1] * sin, every[1] * cos + every[0] * sin


def every_pair(rope_dim: int, width: int) -> Tensor:
    """The frequencies (rope_dim/2,) of a rotary key without weights: the source's in turn, several times if it is wider."""
    return torch.arange(rope_dim // 2) % (width // 2)


def half_split(rope: Rope, width: int, made: str = "halves") -> Rope:
    """A model's tables as those of `width` numbers, half-split: what does not turn stands last in each half.

    `made` says how the model has them: `halves`, those of the first numbers of a head (..., r); `pairs`, the same with both of
    a pair side by side; `once`, one for both of a pair (..., r/2); `none`, of which the layer reads nothing.
    """
    if made == "none":
        shape = *rope[0].shape[:-1], width
        return rope[0].new_ones(1).expand(shape), rope[0].new_zeros(1).expand(shape)
    if made == "halves" and rope[0].shape[-1] >= width:
        return rope
    part = {"pairs": slice(0, None, 2), "once": slice(None), "halves": slice(rope[0].shape[-1] // 2)}[made]
    halves = [t[..., part] for t in rope]
    still = width // 2 - halves[0].shape[-1]
    cos, sin = (F.pad(t, (0, max(still, 0)), value=value) for t, value in zip(halves, (1.0, 0.0), strict=True))
    return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)


def inverse_size(states: Tensor, eps: float, together: bool = False) -> Tensor:
    """What an RMSNorm multiplies states (..., heads, T, D) by: (..., heads, T, 1), or (..., 1, T, 1) for all heads together."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    return (exact.square().mean((-3, -1) if together else -1, keepdim=True) + eps).rsqrt()


SCORES = 1 << 24
"""Scores that exist at a time, about, where attention is written out and nothing is trained."""
FEW = 64
"""Fewer queries than this at a time are slower written out."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    gains: Tensor | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries (B, H, T, E) over keys (B, G, S, E) and values (B, G, S, F) → (B, H, T, F), scores times `scale`.

    Keys or values of a single head serve all, and are not repeated where queries are few. `gains` (B, G', S, 1) multiply the
    scores of every key, by head or for groups of heads. `mask` is transformers': boolean or additive, (B, 1, T, S); None is
    causal from the first key on, whatever stands behind the last query's, and all for one token. `cap` soft-caps scores by
    `cap · tanh(score / cap)`; `sinks` (H,) are scores that a head has beside those of its keys, with nothing behind them.
    """
    heads, tokens = q.shape[1:3]
    if mask is None and tokens > 1:
        k, v, gains = k[:, :, :tokens], v[:, :, :tokens], gains if gains is None else gains[:, :, :tokens]
    groups = max(t.shape[1] for t in (k, v, gains) if t is not None)
    k, v = (t.expand(-1, groups, -1, -1) for t in (k, v))
    if gains is not None:
        gains = gains.repeat_interleave(groups // gains.shape[1], 1).to(k)
    at_once = tokens if tokens == 1 or q.requires_grad else max(1, SCORES // (len(q) * heads * k.shape[2]))
    # A CPU's fused kernel takes up to three times as long as what it fuses, but where keys are so many that few queries fit.
    # Trained, all is written out there: the fused kernel's backward pass takes twice as long in bf16.
    slower = q.device.type == "cpu" and at_once >= min(tokens, FEW)
    if tokens > 1 and cap is None and sinks is None and not slower:
        widest = max(q.shape[-1], v.shape[-1])  # the fused kernels take one number and one width only
        k = k if gains is None else k * gains
        q, k, padded = (F.pad(part, (0, widest - part.shape[-1])) for part in (q, k, v))
        if groups == 1:
            k, padded = (t.expand(-1, heads, -1, -1) for t in (k, padded))
        elif groups < heads:
            k, padded = (t.repeat_interleave(heads // groups, 1) for t in (k, padded))
        return F.scaled_dot_product_attention(q, k, padded, mask, is_causal=mask is None, scale=scale)[..., : v.shape[-1]]
    parts = []
    for start in range(0, tokens, at_once):
        rows = slice(start, min(start + at_once, tokens))
        seen = slice(rows.stop if mask is None and tokens > 1 else None)
        sizes = gains if gains is None else gains[:, :, seen]
        visible = mask if mask is None else mask[..., rows, :]
        parts.append(_written_out(q[:, :, rows], k[:, :, seen], v[:, :, seen], visible, scale, sizes, cap, sinks))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    gains: Tensor | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`attend` by its parts, (B, G, S, ·) each of keys, values and gains: the last of the keys are the queries'."""
    tokens, keys = q.shape[2], k.shape[2]
    grouped = (q * scale).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H/G·T, E)
    scores = (grouped @ k.mT).unflatten(2, (-1, tokens))  # (B, G, H/G, T, S)
    scores = scores if gains is None else scores * gains[:, :, None].mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores if cap is None else cap * (scores / cap).tanh()
    hidden = torch.finfo(scores.dtype).min
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, hidden)
        scores.add_(mask[:, :, None])  # scores are fresh, and a sum passes its gradient on as it is
    elif tokens > 1:
        new = scores if keys == tokens else scores[..., -tokens:]
        new.add_(scores.new_full((tokens, tokens), hidden).triu(1))
    weights = with_sinks(scores, sinks).softmax(-1)[..., :keys]
    return (weights.to(v.dtype).flatten(2, 3) @ v).unflatten(2, (-1, tokens)).flatten(1, 2)


def with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Scores (..., G, H/G, T, S) and behind them those of the sinks (H,), one more of each."""
    if sinks is None:
        return scores
    column = sinks.to(scores).view(*scores.shape[-4:-2], 1, 1)
    return torch.cat([scores, column.expand(*scores.shape[:-1], 1)], -1)


def matrix(linear: Any, columns: int, like: Tensor) -> Tensor:
    """The matrix (rows, columns) of a linear map without bias, in the dtype and on the device of `like`.

    What wraps or replaces the map (adapters, offloading, quantisation) acts when it is called: then it is called on the unit
    vectors.
    """
    if type(linear) is nn.Linear and "forward" not in vars(linear) and not linear._forward_hooks | linear._forward_pre_hooks:
        return linear.weight
    return linear(torch.eye(columns, dtype=like.dtype, device=like.device)).mT


def by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Every head by a matrix of its own: (…, H, T, A), (H, A, B) → (…, H, T, B).

    `x @ matrices` copies the matrices for every sequence of a batch, which takes most of the time of a decoding step.
    """
    return torch.einsum("...hta,hab->...htb", x, matrices)


class Attention(nn.Module):
    """What stands in the place of a transformers attention: an output projection behind heads."""

    turns_when_read = False
    """Whether something of what it caches is turned when it is read; then `rotary_emb` must be the source's rotary module."""
    layer_idx = 0
    """Its place in the cache."""
    head_dim = 0
    """The source's head width, which the tables may fall short of."""
    positions = "halves"
    """How it reads the tables that it is called with: see `half_split`."""
    layer_type = None
    """What the source's rotary module calls its kind of layer, where kinds differ."""
    o_proj: nn.Linear
    rotary_emb: Any

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rope,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        rope, cache = half_split(position_embeddings, self.head_dim, self.positions), past_key_values
        return self.o_proj(self.mix(hidden_states, rope, attention_mask, layer_past if cache is None else cache)), None

    def mix(self, x: Tensor, rope: Rope, mask: Tensor | None = None, cache: Any = None, asking: slice | None = None) -> Tensor:
        """The heads' outputs side by side, before `o_proj`: (B, T, d) → (B, T, H·D).

        Without a cache `asking` says which of the tokens attend, where only some do: → (B, ·, H·D).
        """
        if asking is not None and mask is None:
            mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.heads(x, rope, mask, cache, asking).transpose(1, 2).flatten(2)

    def heads(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Any, asking: slice | None) -> Tensor:
        """As `mix`, with the rotary tables of the tokens: → (B, H, T, D)."""
        raise NotImplementedError


class FoldedAttention(Attention):
    """What the designs share: `q_proj`, or `q_a_proj` and `q_b_proj` when queries are of low rank, and `o_proj`.

    Behind a norm `q_proj` gives the source's queries, and `q_maps` make of each what the design wants.
    """

    keeps_gains = True
    """Whether a norm's scalars are cached; else keys are whole when they are read, and normed then."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        query_width: int,
        value_dim: int,
        q_rank: int | None,
        query_bias: bool,
        output_bias: bool,
        norm: dict[str, Any] | None,
        cap: float | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.cap = cap
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.query_width, self.value_dim, self.scale = query_width, value_dim, query_width**-0.5
        self.head_dim = value_dim
        self.norm, self.gains, self.behind = norm, 0, bool(norm and norm.get("behind"))
        if norm is not None:
            self.q_proj = nn.Linear(hidden, heads * value_dim, bias=query_bias)
            if self.keeps_gains:
                self.gains = min(norm["kv_heads"], 1) if norm["together"] else norm["kv_heads"]
                self.q_maps = nn.Parameter(torch.zeros(heads, query_width, value_dim))
                if self.behind:
                    self.q_norm = nn.Parameter(torch.ones(2, heads, value_dim))
                if self.gains:
                    self.sizing_proj = nn.Linear(hidden, norm["kv_heads"] * value_dim, bias=query_bias)
            else:
                self.q_norm = nn.Parameter(torch.ones(heads, value_dim))
                self.k_norm = nn.Parameter(torch.ones(norm["kv_heads"], value_dim))
        elif q_rank is None:
            self.q_proj = nn.Linear(hidden, heads * query_width, bias=query_bias)
        else:
            self.q_a_proj = nn.Linear(hidden, q_rank, bias=False)
            self.q_b_proj = nn.Linear(q_rank, heads * query_width, bias=query_bias)
        self.o_proj = nn.Linear(heads * value_dim, hidden, bias=output_bias)

    def heads(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Any, asking: slice | None) -> Tensor:
        states = self.states(x, rope)
        if asking is None:
            return self.read(x, states, rope, mask, cache)
        assert mask is not None
        return self.read(x[:, asking], states, at(rope, asking), mask[..., asking, :], None, rope)

    def states(self, x: Tensor, rope: Rope) -> Tensor:
        """What is cached of new tokens: (B, T, d) → (B, 1, T, W)."""
        raise NotImplementedError

    def read(self, x: Tensor, states: Tensor, rope: Rope, mask: Tensor | None, cache: Any, every: Rope | None = None) -> Tensor:
        """Cache the states of new tokens (B, T, d), and let these attend → (B, H, T, D).

        Without a cache `states` may be those of more tokens, whose tables are `every`.
        """
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gains: Tensor | None = None) -> Tensor:
        """`attend` with what the scores of this layer go through."""
        return attend(q, k, v, mask, self.scale, gains, self.cap, self.sinks)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, H, T, E), for `turn`; of a norm behind RoPE (2, B, H, T, E)."""
        if self.norm is None:
            return per_head(self.q_b_proj(self.q_a_proj(x)) if hasattr(self, "q_a_proj") else self.q_proj(x), self.query_width)
        q = self.sized(per_head(self.q_proj(x), self.value_dim))
        if self.behind:
            q = q * self.q_norm[:, None, :, None].to(q)  # (2, B, H, T, D)
        return by_head(q, self.q_maps.mT.to(q))

    def turn(self, q: Tensor, rope: Rope) -> Tensor:
        """Queries to their positions, (B, H, T, E); of a norm behind RoPE the second part (2, B, H, T, E) backwards."""
        return rotate(q[0], rope) + rotate(q[1], (rope[0], -rope[1])) if self.behind else rotate(q, rope)

    def sized(self, states: Tensor) -> Tensor:
        """(B, heads, T, D) over their size, as the norm takes it."""
        norm = self.norm or {}
        return states * inverse_size(states, norm["eps"], norm["together"]).to(states)

    def with_gains(self, x: Tensor, states: Tensor) -> Tensor:
        """What is cached of new tokens: (B, 1, T, E), and behind it a norm's scalars (B, 1, T, G)."""
        if not self.gains:
            return states
        norm = self.norm or {}
        raw = per_head(self.sizing_proj(x), self.value_dim)
        gains = inverse_size(raw, norm["eps"], norm["together"]).to(states)
        return torch.cat([states, gains.transpose(1, 3)], -1)

    def without_gains(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 1, S, E + G) → states (B, 1, S, E) and gains (B, G, S, 1)."""
        if not self.gains:
            return states, None
        states, gains = states.split([states.shape[-1] - self.gains, self.gains], dim=-1)
        return states, gains.transpose(1, 3)

    def cached(self, states: Tensor, cache: Any) -> Tensor:
        """Put (B, 1, T, E) into the cache, as keys without values → (B, 1, S, E)."""
        return states if cache is None else cache.update(states, states[..., :0], self.layer_idx)[0]

    def extended(self, states: Tensor, rope: Rope, cache: Any, every: Rope | None) -> tuple[Tensor, Rope, Rope]:
        """New states (B, 1, T, E) → all of them (B, 1, S, E), the tables of the new ones and of all.

        Their places in the cache turn them, for RoPE knows distances only; where a norm stands behind it, their positions.
        """
        if cache is None:
            return states, rope, every or rope
        before = cache.get_seq_length(self.layer_idx)  # a tensor in a static cache, which moves on in place
        before = before.clone() if isinstance(before, Tensor) else before
        states, tokens = self.cached(states, cache), states.shape[2]
        cos, sin = self.tables(states)
        latest = states.shape[2] - tokens  # a sliding cache drops the oldest
        first = before.clamp(max=latest) if isinstance(before, Tensor) else min(before, latest)
        new = first + torch.arange(tokens, device=states.device)
        at_places = cos[:, new], sin[:, new]
        return (states, rope, moved((cos, sin), at_places, rope)) if self.behind else (states, at_places, (cos, sin))

    def tables(self, states: Tensor) -> Rope:
        """The tables of every place of (B, 1, S, E), worked out once for all layers that share a rotary module."""
        of = (states.shape[2], states.dtype, states.device, torch.is_inference_mode_enabled())
        held = vars(self.rotary_emb).setdefault("held", {})
        kind = (self.layer_type, self.positions)
        if held.get(kind, (None,))[0] != of:
            slots = torch.arange(states.shape[2], device=states.device)[None]
            made = self.rotary_emb(states, slots, *(() if self.layer_type is None else (self.layer_type,)))
            held[kind] = of, half_split(made, self.head_dim, self.positions)
        every: Rope = held[kind][1]
        return every


class LatentAttention(FoldedAttention):
    """MLA, and MFA where the heads have no position-free key (`nope_dim` 0). No norm stands behind the latent.

    With `turned` J above zero, which MFA has not, head h has beside its position-free key and the shared rotary key a third one
    that turns whole, `m_h0 + Σ_j c_j m_hj` over the first J - 1 numbers `c` of the latent. The queries of the position-free key
    read it.
    """

    rope_pairs: Tensor

    def __init__(
        self,
        hidden: int,
        heads: int,
        rank: int,
        rope_dim: int,
        nope_dim: int,
        value_dim: int,
        q_rank: int | None = None,
        query_bias: bool = False,
        cache_bias: bool = True,
        output_bias: bool = True,
        norm: dict[str, Any] | None = None,
        turned: int = 0,
        **scores: Any,
    ) -> None:
        super().__init__(hidden, heads, nope_dim + rope_dim, value_dim, q_rank, query_bias, output_bias, norm, **scores)
        self.rank, self.rope_dim, self.nope, self.turned = rank, rope_dim, nope_dim, turned
        self.kv_a_proj = nn.Linear(hidden, rank + rope_dim, bias=cache_bias)
        self.kv_b_proj = nn.Linear(rank, heads * (nope_dim + value_dim), bias=False)
        self.register_buffer("rope_pairs", every_pair(rope_dim, value_dim))
        if turned:
            self.turns_when_read = True
            self.turned_keys = nn.Parameter(torch.zeros(turned, heads, nope_dim))

    def states(self, x: Tensor, rope: Rope) -> Tensor:
        latent, key = self.kv_a_proj(x)[:, None].split([self.rank, self.rope_dim], dim=-1)
        key = rotate(key, pick(rope, self.rope_pairs)).to(latent)
        return self.with_gains(x, torch.cat([latent, key], -1))

    def read(self, x: Tensor, states: Tensor, rope: Rope, mask: Tensor | None, cache: Any, every: Rope | None = None) -> Tensor:
        whole, q_rope = self.split_queries(x, rope)
        q_nope = whole[0] if self.behind else whole
        new = turns = rope
        if self.turned:
            keys, new, turns = self.extended(states, rope, cache, every)
        else:
            keys = self.cached(states, cache)
        keys, gains = self.without_gains(keys)  # (B, 1, S, r + R)
        # Products per key and head: in the latent T·(2r + R), expanded T·(N + R + D) and once r·(N + D).
        tokens, expanded = x.shape[1], self.nope + self.value_dim
        if cache is not None and (self.nope == 0 or tokens * (2 * self.rank - expanded) <= self.rank * expanded):
            up_k, up_v = self.up(keys)
            q = torch.cat([by_head(q_nope, up_k), q_rope], -1) if self.nope else q_rope  # (B, H, T, r + R), or R
            shared = keys if self.nope else keys[..., self.rank :]
            if self.turned:
                q = torch.cat([q, self.turned_queries(whole, new)], -1)
                shared = torch.cat([shared, self._shared_turned(keys, turns)], -1)
            mixed = self.attend(q, shared, keys[..., : self.rank], mask, gains)  # (B, H, T, r)
            return by_head(mixed, up_v.mT)
        latent, key = keys.split([self.rank, self.rope_dim], dim=-1)
        # Through the modules, not their matrices: adapters and sharding wrap them.
        k, v = per_head(self.kv_b_proj(latent[:, 0]), expanded).split([self.nope, self.value_dim], dim=-1)
        k, q = torch.cat([k, key.expand(-1, k.shape[1], -1, -1)], -1), torch.cat([q_nope, q_rope], -1)
        if self.turned:
            constant, linear = self.turned_keys.to(k).split([1, self.turned - 1])
            turned = constant.transpose(0, 1) + torch.einsum("bsj,jhn->bhsn", latent[:, 0, :, : self.turned - 1], linear)
            q, k = torch.cat([q, self.turn(whole, new).to(q)], -1), torch.cat([k, rotate(turned, turns).to(k)], -1)
        return self.attend(q, k, v, mask, gains)

    def split_queries(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """(B, T, d) → queries (B, H, T, N) of the position-free key, as `queries` has them, and turned ones (B, H, T, R)."""
        q_nope, q_rope = self.queries(x).split([self.nope, self.rope_dim], dim=-1)
        return q_nope, self.turn(q_rope, pick(rope, self.rope_pairs)).to(q_nope)

    def up(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices (H, N, r) and (H, D, r) that expand the latent to position-free keys and values."""
        up = matrix(self.kv_b_proj, self.rank, like).unflatten(0, (-1, self.nope + self.value_dim))
        return up[:, : self.nope], up[:, self.nope :]

    def turned_queries(self, q: Tensor, rope: Rope) -> Tensor:
        """Queries (B, H, T, N), for `turn`, as they read `_shared_turned`: (B, H, T, J·N)."""
        (a, b), (c, d) = q.unsqueeze(-3).chunk(2, -1), self.turned_keys.transpose(0, 1)[:, :, None].to(q).chunk(2, -1)
        read = torch.cat([a * c + b * d, b * c - a * d], -1)  # by the conjugate of each, (B, H, J, T, N)
        return self.turn(read, (rope[0].unsqueeze(-3), rope[1].unsqueeze(-3))).to(q).transpose(2, 3).flatten(3)

    def _shared_turned(self, keys: Tensor, rope: Rope) -> Tensor:
        """What all heads read of the latents (B, 1, S, r + R) that turns whole, ones times 1 and c: (B, 1, S, J·N)."""
        cos, sin = (table[..., : self.nope // 2] for table in rope)
        turn = torch.cat([cos, sin], -1).to(keys)  # (B, S, N)
        numbers = F.pad(keys[:, 0, :, : self.turned - 1], (1, 0), value=1.0)
        return (numbers[..., None] * turn[..., None, :]).flatten(2)[:, None]


class ReusedKeyAttention(FoldedAttention):
    """MFA-KR: one wide key that serves as value too, `v = (I + diag(α) N) k`."""

    turns_when_read = True
    rope_pairs: Tensor

    def __init__(
        self,
        hidden: int,
        heads: int,
        rope_dim: int,
        value_dim: int,
        q_rank: int | None = None,
        query_bias: bool = False,
        cache_bias: bool = True,
        output_bias: bool = True,
        norm: dict[str, Any] | None = None,
        **scores: Any,
    ) -> None:
        super().__init__(hidden, heads, rope_dim, value_dim, q_rank, query_bias, output_bias, norm, **scores)
        self.k_proj = nn.Linear(hidden, rope_dim, bias=cache_bias)
        self.reuse_proj = nn.Linear(rope_dim, rope_dim, bias=False)
        self.alpha = nn.Parameter(torch.ones(rope_dim))
        self.v_b_proj = nn.Linear(rope_dim, heads * value_dim, bias=False)
        self.register_buffer("rope_pairs", every_pair(rope_dim, value_dim))

    def states(self, x: Tensor, rope: Rope) -> Tensor:
        return self.with_gains(x, self.k_proj(x)[:, None])

    def read(self, x: Tensor, states: Tensor, rope: Rope, mask: Tensor | None, cache: Any, every: Rope | None = None) -> Tensor:
        key, new, turns = self.extended(states, rope, cache, every)
        key, gains = self.without_gains(key)
        q, k = self.queries(x), rotate(key, pick(turns, self.rope_pairs)).to(key)
        if self.behind:  # what does not turn has no mirror image
            q = torch.stack([q[0], q[1] * (self.rope_pairs < self.head_dim // 2).repeat(2)])
        q = self.turn(q, pick(new, self.rope_pairs)).to(key)
        if cache is None:
            value = key[:, 0] + self.alpha.to(key) * self.reuse_proj(key[:, 0])
            return self.attend(q, k, per_head(self.v_b_proj(value), self.value_dim), mask, gains)
        return self.values_of(self.attend(q, k, key, mask, gains))

    def values_of(self, mixed: Tensor) -> Tensor:
        """What heads mix of the keys (B, H, T, C), as values (B, H, T, D)."""
        mixed = mixed + self.alpha * self.reuse_proj(mixed)
        return by_head(mixed, matrix(self.v_b_proj, mixed.shape[-1], mixed).unflatten(0, (-1, self.value_dim)).mT)


class RebuiltKeyAttention(FoldedAttention):
    """All keys and values come from the latent again at every step, so that RoPE is the source's: r·G·D products per token."""

    turns_when_read, keeps_gains = True, False

    def __init__(
        self,
        hidden: int,
        heads: int,
        rank: int,
        kv_heads: int,
        value_dim: int,
        q_rank: int | None = None,
        query_bias: bool = False,
        cache_bias: bool = True,
        key_bias: bool = True,
        output_bias: bool = True,
        norm: dict[str, Any] | None = None,
        **scores: Any,
    ) -> None:
        super().__init__(hidden, heads, value_dim, value_dim, q_rank, query_bias, output_bias, norm, **scores)
        self.kv_a_proj = nn.Linear(hidden, rank, bias=cache_bias)
        self.k_b_proj = nn.Linear(rank, kv_heads * value_dim, bias=key_bias)
        self.v_b_proj = nn.Linear(rank, kv_heads * value_dim, bias=False)

    def states(self, x: Tensor, rope: Rope) -> Tensor:
        return self.kv_a_proj(x)[:, None]

    def read(self, x: Tensor, states: Tensor, rope: Rope, mask: Tensor | None, cache: Any, every: Rope | None = None) -> Tensor:
        latent, new, turns = self.extended(states, rope, cache, every)
        k, v = (per_head(proj(latent[:, 0]), self.value_dim) for proj in (self.k_b_proj, self.v_b_proj))
        q, k = self.normed(self.queries(x), new, "q_norm"), self.normed(k, turns, "k_norm")
        return self.attend(q.to(v), k.to(v), v, mask)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, H, T, D), before a norm."""
        return per_head(self.q_proj(x), self.value_dim) if self.norm else super().queries(x)

    def normed(self, states: Tensor, rope: Rope, norm: str) -> Tensor:
        """Whole queries or keys (B, heads, S, D) at their positions, through the norm of that name where there is one."""
        if self.norm is None:
            return rotate(states, rope)
        states, weight = self.sized(states), getattr(self, norm)[:, None].to(states)
        return rotate(states, rope) * weight if self.behind else rotate(states * weight, rope)


def per_head(states: Tensor, width: int) -> Tensor:
    """(B, T, heads·D) → (B, heads, T, D)."""
    return states.unflatten(-1, (-1, width)).transpose(1, 2)


DESIGNS: dict[str, type[FoldedAttention]] = {
    "latent": LatentAttention,
    "reused-key": ReusedKeyAttention,
    "rebuilt-key": RebuiltKeyAttention,
}


PLACES = ("self_attn", "attention", "attn")
"""What decoder layers call their attention."""


def attention_of(layer: nn.Module) -> Any:
    """The attention of a decoder layer."""
    return getattr(layer, _place(layer))


def exchange(layer: nn.Module, attention: nn.Module, positions: str | None = None) -> nn.Module:
    """Put `attention` in the place of a decoder layer's, reading tables as `positions` says; returns what was there."""
    before = attention_of(layer)
    attention.layer_idx = before.layer_idx
    if positions is not None:
        attention.positions = positions  # type: ignore[assignment]
    setattr(layer, _place(layer), attention)
    return before


def fold_in(base: Any, number: int, attention: Any, positions: str = "halves") -> None:
    """Put an attention into layer `number` of a model without its head, with all that it needs to run there with a cache."""
    if attention.turns_when_read:
        folded = (attention_of(layer) for layer in base.layers)
        shared = next((a.rotary_emb for a in folded if isinstance(a, Attention) and a.turns_when_read), None)
        attention.rotary_emb = shared or type(base.rotary_emb)(base.config)
        if isinstance(base.rotary_emb.rope_type, dict):  # kinds of layers differ
            attention.layer_type = base.config.layer_types[number]
    exchange(base.layers[number], attention, positions)


def _place(layer: nn.Module) -> str:
    return next(name for name in PLACES if hasattr(layer, name))
