"""What a family file says, and what kvfold reads out of a config.json with it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvfold.errors import UserError
from kvfold.surgery.attention import AttentionWeights

ROLES = ("q", "k", "v", "o")


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
    """The geometry of a source's attention, the same in every layer.

    Attributes:
        sliding_window: tokens a layer looks back, None when all.
        qkv_bias, o_bias: which projections carry a bias.
        norm_eps: eps of every RMSNorm.
        tied: the output embedding is the input embedding.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    rope: Rope
    sliding_window: int | None
    max_positions: int
    vocab_size: int
    tied: bool
    norm_eps: float

    @property
    def cache_numbers(self) -> int:
        """Numbers cached per token per layer: 2·G·D."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def reach(self) -> int:
        """Tokens over which calibration may run: no longer than the positions and the sliding window of the source."""
        return min(self.max_positions, self.sliding_window or self.max_positions)


@dataclass(frozen=True)
class Family:
    """A source architecture: which tensor plays which role, and which biases there are.

    Attributes:
        projections: role (q, k, v, o) → module name, `{layer}` standing for the layer's number.
        layer_prefix: what the names of a decoder layer's tensors begin with.
        qkv_bias, o_bias: read from a config whether these projections carry a bias.
        sliding_window: read from a config how far its layers look back (None: no limit).
        default_theta: RoPE base when the config names none.
    """

    model_type: str
    architecture: str
    layer_prefix: str
    projections: dict[str, str]
    qkv_bias: Callable[[dict[str, Any]], bool]
    o_bias: Callable[[dict[str, Any]], bool]
    sliding_window: Callable[[dict[str, Any]], int | None]
    default_theta: float = 10000.0

    def spec(self, config: dict[str, Any]) -> AttentionSpec:
        """Read the geometry from config.json. Raises UserError for a missing or impossible value."""
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            layers, vocab = int(config["num_hidden_layers"]), int(config["vocab_size"])
        except KeyError as missing:
            raise UserError(f"config.json lacks {missing}: it is not a complete {self.model_type} config") from None
        except (TypeError, ValueError):
            raise UserError(
                "config.json: hidden_size, num_attention_heads, num_hidden_layers and vocab_size must be numbers; "
                "download it again"
            ) from None
        if min(hidden, heads, layers, vocab) < 1:
            raise UserError(f"config.json: {heads} heads, {layers} layers, width {hidden}, {vocab} tokens is no valid geometry")
        if "quantization_config" in config:
            raise UserError("the source is quantised (config.json has quantization_config): fold the unquantised checkpoint")
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise UserError(f"config.json: {heads} heads over {kv_heads} key heads of width {head_dim} is no valid geometry")
        return AttentionSpec(
            hidden_size=hidden,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qkv_bias=self.qkv_bias(config),
            o_bias=self.o_bias(config),
            rope=self._rope(config),
            sliding_window=self.sliding_window(config),
            max_positions=int(config.get("max_position_embeddings") or 2048),
            vocab_size=vocab,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def _rope(self, config: dict[str, Any]) -> Rope:
        # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling.
        parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or self.default_theta
        kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
        return Rope(kind, float(theta), parameters)

    def names(self, layer: int, spec: AttentionSpec) -> dict[str, str]:
        """Role → tensor name in one layer; biases as `q_bias`, … where the source has them."""
        names = {role: self.projections[role].format(layer=layer) + ".weight" for role in ROLES}
        for role in ROLES:
            if spec.o_bias if role == "o" else spec.qkv_bias:
                names[f"{role}_bias"] = self.projections[role].format(layer=layer) + ".bias"
        return names

    def lift(self, tensors: dict[str, torch.Tensor], spec: AttentionSpec) -> AttentionWeights:
        """Tensors by role, as stored, → canonical form. Raises UserError when a shape contradicts the config."""
        heads = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        wanted: dict[str, tuple[int, ...]] = {role: (n * spec.head_dim, spec.hidden_size) for role, n in heads.items()}
        wanted |= {f"{role}_bias": (n * spec.head_dim,) for role, n in heads.items()}
        wanted |= {"o": (spec.hidden_size, spec.heads * spec.head_dim), "o_bias": (spec.hidden_size,)}
        for role, tensor in tensors.items():
            if tuple(tensor.shape) != wanted[role]:
                raise UserError(f"the {role} tensor has shape {tuple(tensor.shape)}, but config.json means {wanted[role]}")
        split = {r: t if r in ("o", "o_bias") else t.unflatten(0, (-1, spec.head_dim)) for r, t in tensors.items()}
        split["o"] = split["o"].unflatten(1, (-1, spec.head_dim)).permute(1, 0, 2)  # (d, H·D) → (H, d, D)
        return AttentionWeights(**split)
