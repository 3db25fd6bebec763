"""What a family file says, and what kvfold reads out of a config.json with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvfold.convert.families.spec import AttentionSpec, Rope, halves_first, is_ordered
from kvfold.convert.families.unknown import quantisation, unquantised
from kvfold.convert.source.config import resolve
from kvfold.errors import UserError

if TYPE_CHECKING:  # what reads a config does without
    import torch

    from kvfold.surgery.attention import AttentionWeights

ROLES = ("q", "k", "v", "o")
FUSED, SINKS = "qkv", "sinks"


def no_windows(said: dict[str, Any]) -> list[int | None]:
    """Every layer looks back over all tokens."""
    return [None] * said["num_hidden_layers"]


def windows_of_all(said: dict[str, Any]) -> list[int | None]:
    """Every layer looks back over `sliding_window`, where there is one."""
    return [said["sliding_window"]] * said["num_hidden_layers"]


def windows_by_kind(said: dict[str, Any]) -> list[int | None]:
    """Layers that `layer_types` calls sliding look back over `sliding_window`."""
    return [said["sliding_window"] if kind == "sliding_attention" else None for kind in said["layer_types"]]


def all_turn(said: dict[str, Any]) -> list[bool]:
    """RoPE turns the queries and keys of every layer."""
    return [True] * said["num_hidden_layers"]


@dataclass(frozen=True)
class Experts:
    """Experts lie on the disk one by one, and in transformers' memory in one tensor of gates and ups and one of downs.

    Attributes:
        block: what a layer calls what is `mlp` in memory.
        gate, up, down: an expert's matrices.
        router: what is `gate` in memory.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"


@dataclass(frozen=True)
class Family:
    """A source architecture: which tensor plays which role, which biases and norms there are, what scores are multiplied by.

    What is read from a config is read from one that `convert.config.resolve` has completed. What a family leaves out is as in
    Llama, or as the keys of transformers' configs say that many families share.

    Attributes:
        layer_prefix: what the names of a decoder layer's tensors begin with, `{layer}` standing for the layer's number.
        attention: what a layer calls its attention.
        modules: role (q, k, v, o, q_norm and k_norm where there are norms, sinks) → module of the attention. Role qkv is one
            matrix with the rows of q, then those of k, then those of v; `by_head`, with those of each key head together:
            queries that read it, key, value.
        qkv_bias, o_bias: read from a config whether these projections carry a bias.
        windows: read from a config how many tokens each layer looks back (None: all).
        turning: read from a config whether RoPE turns each layer.
        key_norm: see `AttentionSpec`.
        norm_offset: what is added to the stored weight of every norm.
        score_scale, score_cap: see `AttentionSpec`, read from a config.
        experts: see `Experts`; None without.
        partial: whether the class turns only the first numbers of each head where the config says so.
        interleaved, tables: see `AttentionSpec`.
        grouped: whether a fold can have fewer key heads in the class.
        renamed: what the class calls some tensors → what they are called on the disk.
        beside: what its layers have beside attention that Llama's have not, in a few words; stock layouts with other attention
            are Llama's there.
    """

    model_type: str
    architecture: str
    layer_prefix: str = "model.layers.{layer}."
    attention: str = "self_attn"
    modules: Mapping[str, str] = field(default_factory=lambda: {role: f"{role}_proj" for role in ROLES})
    qkv_bias: Callable[[dict[str, Any]], bool] = lambda said: bool(said.get("attention_bias"))
    o_bias: Callable[[dict[str, Any]], bool] = lambda said: bool(said.get("attention_bias"))
    windows: Callable[[dict[str, Any]], list[int | None]] = no_windows
    key_norm: str = ""
    norm_offset: float = 0.0
    score_scale: Callable[[dict[str, Any]], float | None] = lambda said: None
    score_cap: Callable[[dict[str, Any]], float | None] = lambda said: None
    turning: Callable[[dict[str, Any]], list[bool]] = all_turn
    experts: Experts | None = None
    partial: bool = False
    interleaved: bool = False
    tables: str = "halves"
    by_head: bool = False
    grouped: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""

    def spec(self, config: dict[str, Any]) -> AttentionSpec:
        """Read the geometry from config.json, as transformers reads it.

        Raises UserError for a missing or impossible value, and for a model that is quantised or no language model.
        """
        self._refuse_other(config)
        said = resolve(config)
        hidden, heads = said["hidden_size"], said["num_attention_heads"]
        kv_heads = said.get("num_key_value_heads") or heads
        head_dim = said.get("head_dim") or hidden // heads
        if heads % kv_heads or head_dim % 2 or head_dim == 0:
            raise UserError(f"config.json: {heads} heads over {kv_heads} key heads of width {head_dim} is no valid geometry")
        rope = said["rope_parameters"]
        rope = rope.get("full_attention") or rope
        turning = rope.get("partial_rotary_factor") or 1.0
        if not isinstance(turning, (int, float)) or not 0 < turning <= 1:
            raise UserError(
                f"config.json: partial_rotary_factor is {turning!r:.40}, which is no share of a head: check that file"
            )
        if turning != 1.0 and not self.partial:
            raise UserError(
                "config.json describes a model that kvfold does not fold: its RoPE turns a part of each head only "
                f"(partial_rotary_factor {turning})"
            )
        return AttentionSpec(
            hidden_size=hidden,
            layers=said["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qkv_bias=self.qkv_bias(said),
            o_bias=self.o_bias(said),
            rope=self._rope(rope),
            windows=tuple(self.windows(said)),
            turning=tuple(self.turning(said)),
            max_positions=said["max_position_embeddings"],
            vocab_size=said["vocab_size"],
            norm_eps=next(said[key] for key in ("rms_norm_eps", "norm_epsilon", "layer_norm_eps") if key in said),
            tied=said["tie_word_embeddings"],
            rotary_dim=int(head_dim * turning),
            key_norm=self.key_norm,
            score_scale=_above_zero(said, self.score_scale),
            score_cap=_above_zero(said, self.score_cap),
            sinks=SINKS in self.modules,
            beside=self.beside,
            interleaved=self.interleaved,
            tables=self.tables,
        )

    def _refuse_other(self, config: dict[str, Any]) -> None:
        """Raise UserError for quantised weights, and for another head than a language model's on the same layers."""
        if kind := quantisation(config):
            name = unquantised(config)
            raise UserError(f"the source is quantised ({kind}): fold the unquantised checkpoint{f', {name}' if name else ''}")
        named = config.get("architectures") or [self.architecture]
        if not isinstance(named, list) or _plain(self.architecture) not in [_plain(str(name)) for name in named]:
            raise UserError(
                f"config.json names {', '.join(map(str, named)) if isinstance(named, list) else named} (architectures), and "
                f"kvfold folds {self.architecture}: reward, classification and embedding models have another head or none; "
                "fold the language model that it was made from"
            )

    @staticmethod
    def _rope(parameters: dict[str, Any]) -> Rope:
        others = {key: value for key, value in parameters.items() if key not in ("rope_type", "type", "rope_theta")}
        return Rope(parameters["rope_type"], float(parameters["rope_theta"]), others)

    def names(self, layer: int, spec: AttentionSpec) -> dict[str, str]:
        """Role → tensor name in one layer; biases as `q_bias`, … where the source has them, and norms as `q_norm`, `k_norm`."""
        prefix = self.attention_prefix(layer)
        names = {role: f"{prefix}{module}" + ".weight" * (role != SINKS) for role, module in self.modules.items()}
        for role in self.modules.keys() & {*ROLES, FUSED}:
            if spec.o_bias if role == "o" else spec.qkv_bias:
                names[f"{role}_bias"] = f"{prefix}{self.modules[role]}.bias"
        return names

    def stored_as(self, name: str, held: Container[str]) -> list[list[str]]:
        """Where a parameter of the class lies among the tensors `held`: for every expert what stands one below the other."""
        if self.experts is None or name in held:
            return [[name if name in held else self.renamed.get(name, name)]]
        stored = name.replace(f".mlp.{self.experts.router}.", ".mlp.gate.").replace(".mlp.", f".{self.experts.block}.")
        stem, _, last = stored.rpartition(".")
        parts = {"gate_up_proj": (self.experts.gate, self.experts.up), "down_proj": (self.experts.down,)}.get(last)
        if not stem.endswith(".experts") or parts is None:
            return [[f"{stem}.{last}"]]
        count = next(number for number in itertools.count() if f"{stem}.{number}.{parts[0]}.weight" not in held)
        return [[f"{stem}.{number}.{part}.weight" for part in parts] for number in range(count)]

    def is_stacked(self, name: str, held: Container[str]) -> bool:
        """Whether a parameter of the class holds all experts, which lie one by one among the tensors `held`."""
        return self.experts is not None and name not in held and ".mlp.experts." in name

    def called(self, stored: str) -> str:
        """What the class calls a tensor that has another name on the disk."""
        return next((name for name, other in self.renamed.items() if other == stored), stored)

    def reading(self, held: Container[str], read: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
        """What reads a parameter of the class, from a map of the names `held` to their tensors."""

        import torch

        def assembled(name: str) -> torch.Tensor:
            rows = self.stored_as(name, held)
            if not self.is_stacked(name, held):
                return read(rows[0][0])
            return torch.stack([torch.cat([read(part) for part in row]) for row in rows])

        return assembled

    def attention_prefix(self, layer: int) -> str:
        """What the names of the attention's tensors begin with."""
        return f"{self.layer_prefix.format(layer=layer)}{self.attention}."

    def lift(self, tensors: dict[str, torch.Tensor], spec: AttentionSpec) -> AttentionWeights:
        """Tensors by role, as stored, → canonical form. Raises UserError when a shape contradicts the config."""
        import torch

        from kvfold.surgery.attention import AttentionWeights

        heads = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        wanted: dict[str, tuple[int, ...]] = {role: (n * spec.head_dim, spec.hidden_size) for role, n in heads.items()}
        wanted[FUSED] = (sum(heads.values()) * spec.head_dim, spec.hidden_size)
        wanted |= {f"{role}_bias": rows[:1] for role, rows in wanted.items()}
        for role, n in heads.items():
            shapes = {"whole": (n * spec.head_dim,), "centred": (n, spec.head_dim)}
            wanted[f"{role}_norm"] = shapes.get(spec.key_norm, (spec.head_dim,))
        wanted |= {"o": (spec.hidden_size, spec.heads * spec.head_dim), "o_bias": (spec.hidden_size,)}
        wanted[SINKS] = (spec.heads,)
        for role, tensor in tensors.items():
            if tuple(tensor.shape) != wanted[role]:
                raise UserError(f"the {role} tensor has shape {tuple(tensor.shape)}, but config.json means {wanted[role]}")
        each = spec.key_norm != "whole"  # then norms have no heads to be split into
        whole = ("o", "o_bias", SINKS, *(("q_norm", "k_norm") if each else ()))
        split = {role: t if role in whole else t.unflatten(0, (-1, spec.head_dim)) for role, t in tensors.items()}
        for end in {"", "_bias"} & {role.removeprefix(FUSED) for role in split}:
            split |= self._cut(split.pop(FUSED + end), end, spec)
        split["o"] = split["o"].unflatten(1, (-1, spec.head_dim)).permute(1, 0, 2)  # (d, H·D) → (H, d, D)
        for role in {"q_norm", "k_norm"} & split.keys():
            split[role] = (split[role] + self.norm_offset)[..., halves_first(spec)]
        for role in {"q", "k", "q_bias", "k_bias"} & split.keys() if spec.key_norm == "centred" else ():
            split[role] = split[role] - split[role].mean(1, keepdim=True)  # then a LayerNorm is an RMSNorm
        for role in {"q", "k", "q_bias", "k_bias"} & split.keys() if is_ordered(spec) else ():
            split[role] = split[role][:, halves_first(spec)]
        if spec.key_norm:
            norm = spec.norm_eps, not each, spec.key_norm == "behind"
            split["norm"] = torch.tensor(norm, dtype=torch.float64)
        for role, value in (("scale", spec.score_scale), ("cap", spec.score_cap)):
            if value is not None:
                split[role] = torch.tensor(value, dtype=torch.float64)
        return AttentionWeights(**split)

    def _cut(self, heads: torch.Tensor, end: str, spec: AttentionSpec) -> dict[str, torch.Tensor]:
        """All heads of a fused matrix (H + 2·G, D, …) → those of q, k and v, under their roles with `end`."""
        if self.by_head:
            groups = heads.unflatten(0, (spec.kv_heads, -1))  # (G, H/G + 2, D, …)
            parts = groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]
        else:
            parts = heads.split([spec.heads, spec.kv_heads, spec.kv_heads])
        return {f"{role}{end}": part for role, part in zip(FUSED, parts, strict=True)}

    def stored_heads(self, heads: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        """Queries, keys or their biases (heads, D, …) of the canonical form as they are stored: (heads·D, …)."""
        return (heads[:, halves_first(spec).argsort()] if is_ordered(spec) else heads).flatten(0, 1)

    def stored_norms(self, weights: AttentionWeights, spec: AttentionSpec) -> dict[str, torch.Tensor]:
        """The norms' weights by role, as they are stored."""
        held = {"q_norm": weights.q_norm, "k_norm": weights.k_norm}
        order = halves_first(spec).argsort()
        return {role: weight[..., order].flatten() - self.norm_offset for role, weight in held.items() if weight is not None}


def _above_zero(said: dict[str, Any], read: Callable[[dict[str, Any]], float | None]) -> float | None:
    """What scores are multiplied or capped by. Raises UserError where that is no number above zero."""
    try:
        value = read(said)
        if value is None or 0 < value < math.inf:
            return value
    except (TypeError, ValueError, ZeroDivisionError):
        value = None
    raise UserError(f"config.json scales or caps scores by what is no number above zero ({value}): check that file")


def _plain(architecture: str) -> str:
    """A class's name as others may spell it: Ernie4_5_ForCausalLM."""
    return architecture.lower().replace("_", "")
