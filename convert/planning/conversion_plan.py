"""What a conversion would do: geometry of source and target, what is cached, what stands in the way. As data, and as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from kvfold.convert.families import AttentionSpec, Family
from kvfold.convert.planning import parameters
from kvfold.convert.planning.engines import LatentShape
from kvfold.convert.planning.settings import DTYPE_BYTES, LATENT_TARGETS, ConvertSettings
from kvfold.convert.planning.widths import kept_scalars, rebuilds
from kvfold.errors import UserError
from kvfold.surgery.names import full_rank

NOTHING = LatentShape(0, 0, 0, 0)
CONTEXTS = (4096, 32768, 131072)
TURNED = 3
"""Keys that turn whole where nobody asked for a number: a constant, and those of two numbers of the latent."""


@dataclass(frozen=True)
class ConversionPlan:
    """Source and target geometry, what is gained, and what stands in the way.

    Attributes:
        layout: `source`, `deepseek_v3`, `step3_text` or `kvfold`, a module of `layouts`.
        kv_heads: key/value heads of the target (gqa, mqa), else the source's.
        kv_rank, rope_dim: widths of the latent and of the shared key (mla; both the width for mfa, no latent for mfa-kr).
        stored: these and the head widths as the checkpoint stores them, padding included.
        folded: the layers that are folded; the others stay as they are.
        widths: latent and shared key of every folded layer where they differ, else empty.
        widest_rope: how wide a layer's rotary key may become where the calibration text decides it.
        method, grouping: resolved, with the defaults filled in.
        refusals: each a reason with the remedy; a plan that has any cannot be carried out.
        within: `model_type` of the larger model that is written with the folded one in it, empty where it is written alone.
    """

    family: Family
    spec: AttentionSpec
    settings: ConvertSettings
    layout: str
    folded: tuple[int, ...]
    kv_heads: int
    method: str
    grouping: str
    kv_rank: int = 0
    rope_dim: int = 0
    stored: LatentShape = NOTHING
    widths: tuple[tuple[int, int], ...] = ()
    widest_rope: int = 0
    note: str = ""
    refusals: list[str] = field(default_factory=list)
    within: str = ""

    @property
    def design(self) -> str:
        """`grouped`, or one of the three designs of the kvfold layout."""
        if self.settings.to not in LATENT_TARGETS:
            return "grouped"
        if self.settings.to == "mfa-kr":
            return "reused-key"
        return "rebuilt-key" if rebuilds(self.settings) else "latent"

    @property
    def architecture(self) -> str:
        """The class that the checkpoint will name."""
        own = {
            "deepseek_v3": "DeepseekV3ForCausalLM",
            "step3_text": "Step3TextForCausalLM",
            "kvfold": "KvfoldForCausalLM",
        }
        return own.get(self.layout, self.family.architecture)

    @property
    def q_rank(self) -> int | None:
        """Rank of the queries, None where they are read at once; step3_text always goes through one, at least the full one."""
        if self.settings.q_rank is None and self.layout == "step3_text":
            return min(self.spec.hidden_size, self.spec.heads * self.rope_dim)
        return self.settings.q_rank

    def turned_keys(self, rank: int, rope: int) -> int:
        """Keys that turn whole with a latent of `rank` numbers and a shared key of `rope`: none where RoPE turns none."""
        if not rope or (self.design, self.settings.to, self.layout, self.method) != ("latent", "mla", "kvfold", "kvfold"):
            return 0
        return min(TURNED if self.settings.turned_keys is None else self.settings.turned_keys, rank)

    @property
    def measures_widths(self) -> bool:
        """Whether the layers' widths wait for the calibration text: their budgets, or how latent and rotary key share one. In
        `deepseek_v3` all layers share it alike."""
        free = self.settings.kv_budget is not None and self.settings.rope_dim is None
        shared = free and self.settings.to == "mla" and self.design == "latent"
        return self.settings.layer_budgets == "measured" or (shared and self.method == "kvfold")

    def layer_widths(self, layer: int) -> tuple[int, int]:
        """Latent and shared key of a folded layer. MLA without RoPE has all in the latent."""
        rank, rope = self.widths[self.folded.index(layer)] if self.widths else (self.kv_rank, self.rope_dim)
        if self.design == "latent" and self.settings.to == "mla" and not self.spec.turning[layer]:
            return min(rank + rope, full_rank(self.spec.hidden_size, self.spec.kv_heads, self.spec.head_dim)), 0
        return rank, rope

    def layer_numbers(self, layer: int) -> int:
        """Cached numbers per token of one layer of the target."""
        if layer not in self.folded:
            return self.spec.cache_numbers
        if self.design == "grouped":
            return 2 * self.kv_heads * self.spec.head_dim
        widths = self.layer_widths(layer) if self.layout == "kvfold" else (self.stored.rank, self.stored.rope)
        return sum(widths) + kept_scalars(self.spec, self.settings)

    @property
    def cache_numbers(self) -> float:
        """Cached numbers per token per layer of the target, in the mean of all layers."""
        total = sum(map(self.layer_numbers, range(self.spec.layers)))
        return total / self.spec.layers if total % self.spec.layers else total // self.spec.layers

    @property
    def width_numbers(self) -> float:
        """Latent and shared key together, in the mean of the folded layers: without the sizes of normed keys."""
        if self.widths:
            return sum(map(sum, self.widths)) / len(self.widths)
        return self.stored.rank + self.stored.rope

    @property
    def kv_budget(self) -> float:
        """Target cache over source cache."""
        return self.cache_numbers / self.spec.cache_numbers

    def cache_bytes(self, tokens: int, batch: int, dtype: str) -> tuple[int, int]:
        """Bytes of the whole cache, source and target. A layer with a sliding window keeps no more tokens than that."""
        spec = self.spec
        kept = [batch * DTYPE_BYTES[dtype] * min(tokens, window or tokens) for window in spec.windows]
        target = sum(size * self.layer_numbers(layer) for layer, size in enumerate(kept))
        return spec.cache_numbers * sum(kept), target

    @property
    def parameters_saved(self) -> int:
        """Fewer parameters in all layers; less than none where latents are expanded again."""
        return parameters.saved(self)

    def refuse(self, converting: bool = False) -> None:
        """Raise UserError with every refusal, if there are any. Calibration text is only missed when `converting`."""
        refusals = list(self.refusals)
        if converting and self.design != "grouped" and self.settings.calibrate is None:
            refusals.append(f"--to {self.settings.to} needs calibration text: give --calibrate TEXT, or --calibrate self")
        if refusals:
            raise UserError("; ".join(refusals))

    def target(self) -> dict[str, Any]:
        """What the target is, as JSON data."""
        if self.design == "grouped":
            geometry: dict[str, Any] = {"kv_heads": self.kv_heads, "grouping": self.grouping, "note": self.note}
        else:
            geometry = {"design": self.design, "kv_rank": self.kv_rank, "rope_dim": self.rope_dim}
            geometry |= {"stored": asdict(self.stored), "note": self.note}
            if self.widths:
                geometry["widths"] = self.widths
        if len(self.folded) < self.spec.layers:
            geometry["folded_layers"] = list(self.folded)
        own = {"method": self.method, "layout": self.layout, "architecture": self.architecture}
        return {"to": self.settings.to, **geometry, **own}

    def record(self, batch: int, dtype: str, source_parameters: int) -> dict[str, Any]:
        """The plan as JSON data; `source_parameters` is the source's number."""
        return {
            "source": {
                **asdict(self.spec),
                "sliding_window": self.spec.sliding_window,
                "full_layers": len(self.spec.full_layers),
                "model_type": self.family.model_type,
                "architecture": self.family.architecture,
                "parameters": source_parameters,
            },
            "target": {
                **self.target(),
                "parameters": source_parameters - parameters.saved_at_least(self),
                "parameters_are_a_bound": self.measures_widths and not self.widths,
            },
            "cache_numbers_per_token_per_layer": {"source": self.spec.cache_numbers, "target": self.cache_numbers},
            "cache_bytes_per_token": dict(zip(("source", "target"), self.cache_bytes(1, 1, dtype), strict=True)),
            "kv_budget": self.kv_budget,
            "cache_bytes": [
                {
                    "context": n,
                    "batch": batch,
                    **dict(zip(("source", "target"), self.cache_bytes(n, batch, dtype), strict=True)),
                }
                for n in CONTEXTS
            ],
            "cache_dtype": dtype,
            "refusals": self.refusals,
        }
