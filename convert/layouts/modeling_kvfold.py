"""Models whose attention was folded by kvfold, for transformers: MLA, MFA and MFA-KR with a cache that holds latents only.

This file needs torch and transformers alone. It travels with every checkpoint of the `kvfold` layout, which loads by
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or without that flag where kvfold is imported.

Everything but attention is Mistral's, which is Llama's with an optional sliding window. `config.attention_design` says which of
the three attentions below a checkpoint has:

- `latent`: MLA (2405.04434) and, with `qk_nope_head_dim` 0, MFA (2412.19255). Cached: `r + R` numbers per token, a latent and
  a shared rotary key. Short queries attend in the latent (absorbed), so decoding never expands the past.
- `reused-key`: MFA-KR (2412.19255). Cached: the key before its rotation, `C` numbers; it is turned when it is read.
- `rebuilt-key`: a latent of `r` numbers from which all keys and values are rebuilt at every step.

Shapes: B batch, T new tokens, S cached and new tokens, H query heads, D head width of the source.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    MistralRotaryEmbedding,
)


class KvfoldConfig(MistralConfig):
    """`MistralConfig` with the widths of the folded attention.

    `num_key_value_heads`, `head_dim`, `rope_parameters` and `sliding_window` are the source's. `kv_lora_rank` and
    `qk_rope_head_dim` are one number or one per layer; for `reused-key` the latter is the width of the key.
    """

    model_type = "kvfold"
    base_model_tp_plan = {}  # noqa: RUF012
    attention_design = "latent"
    kv_lora_rank = None
    qk_rope_head_dim = None
    qk_nope_head_dim = None
    q_lora_rank = None
    query_bias = False
    mlp_bias = False


Tables = tuple[Tensor, Tensor]
"""Cosines and sines, (B, T, D) each."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (..., T, E), half-split, by tables (..., T, E)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def pick(position_embeddings: Tables, pairs: Tensor) -> Tables:
    """Rotary tables (B, T, D) → those of the source's frequencies `pairs`, (B, 1, T, 2·len(pairs)); D/2 means no rotation."""
    cos, sin = (table[..., : table.shape[-1] // 2] for table in position_embeddings)
    still = torch.ones_like(cos[..., :1])
    cos, sin = torch.cat([cos, still], -1)[..., pairs], torch.cat([sin, torch.zeros_like(still)], -1)[..., pairs]
    return torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Queries (B, H, T, E) over keys (B, G, S, E) and values (B, G, S, F) → (B, H, T, F), scores times `scale`.

    The keys of a single head are not repeated. `mask` is transformers': boolean or additive, (B, 1, T, S), None for causal.
    """
    batch, heads, tokens, width = q.shape
    if tokens > 1:
        padded = F.pad(v, (0, width - v.shape[-1])) if v.shape[-1] < width else v  # fused kernels want one width
        k, padded = (
            t.repeat_interleave(heads // t.shape[1], 1) if t.shape[1] > 1 else t.expand(-1, heads, -1, -1) for t in (k, padded)
        )
        return F.scaled_dot_product_attention(q, k, padded, mask, is_causal=mask is None, scale=scale)[..., : v.shape[-1]]
    grouped = (q * scale).view(batch, k.shape[1], -1, width)  # (B, H, 1, E) → (B, G, H/G, E)
    scores = (grouped @ k.mT).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1).to(v.dtype) @ v).view(batch, heads, 1, -1)


def of_layer(widths: int | list[int], layer: int) -> int:
    return widths if isinstance(widths, int) else widths[layer]


def matrix(linear: Any, columns: int, like: Tensor) -> Tensor:
    """The matrix (rows, columns) of a linear map without bias, in the dtype and on the device of `like`.

    What wraps or replaces the map (adapters, offloading, quantisation) acts when it is called: then it is called on the unit
    vectors.
    """
    if type(linear) is nn.Linear and "forward" not in vars(linear) and not linear._forward_hooks | linear._forward_pre_hooks:
        return linear.weight
    return linear(torch.eye(columns, dtype=like.dtype, device=like.device)).mT


class FoldedAttention(nn.Module):
    """What the designs share: queries, full or of low rank, and the output projection."""

    def __init__(self, config: Any, layer_idx: int, query_width: int, value_width: int) -> None:
        super().__init__()
        self.layer_idx, self.query_width, self.scale = layer_idx, query_width, query_width**-0.5
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
        if rank is None:
            self.q_proj = nn.Linear(hidden, heads * query_width, bias=config.query_bias)
        else:
            self.q_a_proj = nn.Linear(hidden, rank, bias=False)
            self.q_b_proj = nn.Linear(rank, heads * query_width, bias=config.query_bias)
        self.o_proj = nn.Linear(heads * value_width, hidden, bias=True)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, d) → (B, H, T, E)."""
        q = self.q_b_proj(self.q_a_proj(x)) if hasattr(self, "q_a_proj") else self.q_proj(x)
        return q.unflatten(-1, (-1, self.query_width)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tables,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        out = self.heads(hidden_states, position_embeddings, attention_mask, past_key_values)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def heads(self, x: Tensor, tables: Tables, mask: Tensor | None, cache: Any) -> Tensor:
        """The heads' outputs: (B, T, d), the rotary tables of its tokens, mask and cache → (B, H, T, D)."""
        raise NotImplementedError

    def cached(self, states: Tensor, cache: Any) -> Tensor:
        """Put (B, 1, T, E) into the cache, as keys without values → (B, 1, S, E)."""
        return states if cache is None else cache.update(states, states[..., :0], self.layer_idx)[0]


class LatentAttention(FoldedAttention):
    """MLA, and MFA where the heads have no position-free key."""

    rope_pairs: Tensor

    def __init__(self, config: Any, layer_idx: int) -> None:
        rank, rope = of_layer(config.kv_lora_rank, layer_idx), of_layer(config.qk_rope_head_dim, layer_idx)
        super().__init__(config, layer_idx, config.qk_nope_head_dim + rope, config.head_dim)
        self.rank, self.rope, self.nope, self.value = rank, rope, config.qk_nope_head_dim, config.head_dim
        self.kv_a_proj = nn.Linear(config.hidden_size, self.rank + self.rope, bias=True)
        self.kv_b_proj = nn.Linear(self.rank, config.num_attention_heads * (self.nope + self.value), bias=False)
        self.register_buffer("rope_pairs", torch.arange(self.rope // 2) % (config.head_dim // 2))

    def heads(self, x: Tensor, tables: Tables, mask: Tensor | None, cache: Any) -> Tensor:
        cos, sin = pick(tables, self.rope_pairs)
        q_nope, q_rope = self.queries(x).split([self.nope, self.rope], dim=-1)  # (B, H, T, N), (B, H, T, R)
        latent, key = self.kv_a_proj(x)[:, None].split([self.rank, self.rope], dim=-1)
        q_rope, key = rotate(q_rope, cos, sin), rotate(key, cos, sin)
        keys = self.cached(torch.cat([latent, key], -1), cache)  # (B, 1, S, r + R)
        # Products per key and head: in the latent T·(2r + R), expanded T·(N + R + D) and once r·(N + D).
        tokens = x.shape[1]
        if self.nope == 0 or tokens * (2 * self.rank - self.nope - self.value) <= self.rank * (self.nope + self.value):
            up = matrix(self.kv_b_proj, self.rank, keys).unflatten(0, (-1, self.nope + self.value))
            up_k, up_v = up.split([self.nope, self.value], 1)
            q = torch.cat([q_nope @ up_k, q_rope], -1) if self.nope else q_rope  # (B, H, T, r + R), or R
            read = keys if self.nope else keys[..., self.rank :]
            return attend(q, read, keys[..., : self.rank], mask, self.scale) @ up_v.mT  # (B, H, T, r) → (B, H, T, D)
        latent, key = keys.split([self.rank, self.rope], dim=-1)
        expanded = self.kv_b_proj(latent[:, 0]).unflatten(-1, (-1, self.nope + self.value)).transpose(1, 2)
        k, v = expanded.split([self.nope, self.value], dim=-1)
        k = torch.cat([k, key.expand(-1, k.shape[1], -1, -1)], -1)
        return attend(torch.cat([q_nope, q_rope], -1), k, v, mask, self.scale)


class ReadTimeRotation(FoldedAttention):
    """A cache that holds states before their rotation. Its own positions turn them: RoPE knows distances only."""

    def __init__(self, config: Any, layer_idx: int, query_width: int) -> None:
        super().__init__(config, layer_idx, query_width, config.head_dim)
        self.rotary_emb = MistralRotaryEmbedding(config)

    def extended(self, states: Tensor, position_embeddings: Tables, cache: Any) -> tuple[Tensor, Tables, Tables]:
        """New states (B, 1, T, E) → all of them (B, 1, S, E), the tables of the new tokens and those of all."""
        if cache is None:
            return states, position_embeddings, position_embeddings
        before = cache.get_seq_length(self.layer_idx)  # a tensor in a static cache, which moves on in place
        before = before.clone() if isinstance(before, Tensor) else before
        states, tokens = self.cached(states, cache), states.shape[2]
        slots = torch.arange(states.shape[2], device=states.device)
        cos, sin = self.rotary_emb(states, slots[None])
        # A sliding cache drops the oldest.
        new = torch.as_tensor(before, device=states.device).clamp(max=states.shape[2] - tokens) + slots[:tokens]
        return states, (cos[:, new], sin[:, new]), (cos, sin)


class ReusedKeyAttention(ReadTimeRotation):
    """MFA-KR: one wide key that serves as value too, `v = (I + diag(α) N) k`."""

    rope_pairs: Tensor

    def __init__(self, config: Any, layer_idx: int) -> None:
        width = of_layer(config.qk_rope_head_dim, layer_idx)
        super().__init__(config, layer_idx, width)
        self.value = config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, width, bias=True)
        self.reuse_proj = nn.Linear(width, width, bias=False)
        self.alpha = nn.Parameter(torch.ones(width))
        self.v_b_proj = nn.Linear(width, config.num_attention_heads * self.value, bias=False)
        self.register_buffer("rope_pairs", torch.arange(width // 2) % (config.head_dim // 2))

    def heads(self, x: Tensor, tables: Tables, mask: Tensor | None, cache: Any) -> Tensor:
        key = self.k_proj(x)[:, None]
        key, new, every = self.extended(key, tables, cache)
        q = rotate(self.queries(x), *pick(new, self.rope_pairs))
        mixed = attend(q, rotate(key, *pick(every, self.rope_pairs)), key, mask, self.scale)  # (B, H, T, C)
        mixed = mixed + self.alpha * self.reuse_proj(mixed)
        return mixed @ matrix(self.v_b_proj, key.shape[-1], key).unflatten(0, (-1, self.value)).mT  # (B, H, T, D)


class RebuiltKeyAttention(ReadTimeRotation):
    """All keys and values come from the latent again at every step, so that RoPE is the source's."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.head_dim)
        rank, self.width = of_layer(config.kv_lora_rank, layer_idx), config.head_dim
        self.kv_a_proj = nn.Linear(config.hidden_size, rank, bias=True)
        self.k_b_proj = nn.Linear(rank, config.num_key_value_heads * self.width, bias=True)
        self.v_b_proj = nn.Linear(rank, config.num_key_value_heads * self.width, bias=False)

    def heads(self, x: Tensor, tables: Tables, mask: Tensor | None, cache: Any) -> Tensor:
        latent, new, every = self.extended(self.kv_a_proj(x)[:, None], tables, cache)
        k, v = (proj(latent[:, 0]).unflatten(-1, (-1, self.width)).transpose(1, 2) for proj in (self.k_b_proj, self.v_b_proj))
        (new_cos, new_sin), (cos, sin) = ((c[:, None], s[:, None]) for c, s in (new, every))
        return attend(rotate(self.queries(x), new_cos, new_sin), rotate(k, cos, sin), v, mask, self.scale)


DESIGNS = {"latent": LatentAttention, "reused-key": ReusedKeyAttention, "rebuilt-key": RebuiltKeyAttention}


class KvfoldDecoderLayer(MistralDecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn: nn.Module = DESIGNS[config.attention_design](config, layer_idx)  # type: ignore[assignment]
        self.mlp: nn.Module = LlamaMLP(config)  # type: ignore[assignment]


class KvfoldPreTrainedModel(MistralPreTrainedModel):
    config_class = KvfoldConfig
    _no_split_modules = ["KvfoldDecoderLayer"]  # noqa: RUF012
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": KvfoldDecoderLayer}  # noqa: RUF012


class KvfoldModel(KvfoldPreTrainedModel, MistralModel):
    def __init__(self, config: KvfoldConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(KvfoldDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()


class KvfoldForCausalLM(KvfoldPreTrainedModel, MistralForCausalLM):
    def __init__(self, config: KvfoldConfig) -> None:
        super().__init__(config)
        self.model = KvfoldModel(config)
        self.post_init()


AutoConfig.register("kvfold", KvfoldConfig, exist_ok=True)
AutoModelForCausalLM.register(KvfoldConfig, KvfoldForCausalLM, exist_ok=True)
# `save_pretrained` then copies this file too
KvfoldConfig.register_for_auto_class()
KvfoldForCausalLM.register_for_auto_class("AutoModelForCausalLM")
