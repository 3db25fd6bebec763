"""vLLM's own models with folded attention in their layers. Imported by vLLM when it opens a folded checkpoint.

`KvfoldLlamaForCausalLM` and the others of `checks.SERVED` are made when they are asked for: vLLM's class of the source's
family, whose attention is exchanged behind its constructor.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed import tensor_model_parallel_all_reduce as all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from kvfold.serving import paged
from kvfold.serving.checks import SERVED, folded_architecture
from kvfold.serving.ranks import local, share
from kvfold.surgery.kvfold_attention import DESIGNS, Rope, half_split


class Builder(AttentionMetadataBuilder):
    """Makes of what vLLM knows of a step what `paged` takes; all layers share it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)  # abstract there

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        common = common_attn_metadata
        made = getattr(common, "kvfold_step", None)
        if made is None:
            starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
            slots = common.slot_mapping[: common.num_actual_tokens].long()
            made = paged.Step(starts, lengths[: len(starts) - 1], common.block_table_tensor, slots)
            common.kvfold_step = made
        return made


class Backend(AttentionBackend):
    """PyTorch's operations on any device."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "KVFOLD"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the layer attends by itself")

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class Tables(nn.Module):
    """The angles that vLLM computes for the source, as transformers' rotary modules give them."""

    angles: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        # Not vLLM's attention's own: some divide the hidden size by the heads to know a head's width
        width = next(widths["value_dim"] for widths in config.folded_layers if widths is not None)
        rotary = get_rope(width, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters)
        self.register_buffer("angles", rotary.cos_sin_cache, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Rope:
        known = positions.clamp(max=len(self.angles) - 1)  # whole spans are asked for, beyond what is ever read
        cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in self.angles[known].chunk(2, dim=-1))
        return cos, sin


class FoldedLayer(nn.Module, AttentionLayerBase):
    """In the place of a layer's attention: a design of kvfold_attention.py over vLLM's pages."""

    def __init__(self, name: str, tables: Tables, widths: dict[str, Any], window: int | None, config: VllmConfig) -> None:
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        shape = local({name: value for name, value in widths.items() if name != "design"}, self.ranks)
        self.folded = DESIGNS[widths["design"]](config.model_config.hf_config.hidden_size, **shape)
        self.folded.rotary_emb = tables
        self.width = widths.get("rank", 0) + widths.get("rope_dim", 0) + self.folded.gains
        self.paged = paged.Layer(self.folded, window)
        self.num_heads, self.cache_config = shape["heads"], config.cache_config
        self.layer_name, self.kv_cache = name, torch.tensor([])
        config.compilation_config.static_forward_context[name] = self  # in the place of what vLLM put there

    def compile_kernel(self) -> None:
        """Before the first request: it is compiled for these widths and compared with PyTorch's operations."""
        weight = self.folded.o_proj.weight
        self.paged.kernel(self.cache_config.block_size, weight.dtype, weight.device)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            head_size_v=0,
            dtype=vllm_config.model_config.dtype,
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """(n, d) → (n, d)."""
        rope = half_split(self.folded.rotary_emb(hidden_states, positions), self.folded.head_dim)
        step = get_forward_context().attn_metadata
        if step is None:  # vLLM measures how much memory a step takes
            mixed = self.folded.mix(hidden_states[None], (rope[0][None], rope[1][None]))[0]
        else:
            pages = self.kv_cache[:, 0]  # (pages, 1, N, W)
            mixed = self.paged.attend(hidden_states, rope, pages, step[self.layer_name])
        out = self.folded.o_proj(mixed)
        return all_reduce(out) if self.ranks > 1 else out


class Folded:
    """What is added to vLLM's class of a source family."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        layers: Any = self.model.layers  # type: ignore[attr-defined]
        tables = Tables(config)  # all layers turn alike
        for number, widths in enumerate(config.folded_layers):
            if widths is not None:
                name, window = layers[number].self_attn.attn.layer_name, window_of(config, number)
                layers[number].self_attn = FoldedLayer(name, tables, widths, window, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The folded layers' tensors go where they belong, the rest vLLM's way.

        Raises:
            ValueError: The checkpoint lacks tensors of a folded layer.
        """
        wanted = {name: t for name, t in self.state_dict().items() if ".folded." in name}  # type: ignore[attr-defined]
        loaded: set[str] = set()
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                ours = name.replace(".self_attn.", ".self_attn.folded.")
                if ours in wanted:
                    wanted[ours].copy_(share(ours.split(".folded.")[1], tensor, rank, ranks))
                    loaded.add(ours)
                else:
                    yield name, tensor

        theirs = super().load_weights(others())  # type: ignore[misc]
        if missing := wanted.keys() - loaded:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of its folded layers, {min(missing)} among them")
        for layer in self.modules():  # type: ignore[attr-defined]
            if isinstance(layer, FoldedLayer):
                layer.compile_kernel()
        return loaded | theirs


def window_of(config: Any, layer: int) -> int | None:
    """How many tokens a token of this layer sees, itself included; None for all."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if sliding else None


@cache
def folded(family: str) -> type[nn.Module]:
    """vLLM's class of a source family with folded attention."""
    theirs = ModelRegistry.models[SERVED[family]].load_model_cls()
    return type(folded_architecture(family), (Folded, theirs), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    for family in SERVED:
        if name == folded_architecture(family):
            return folded(family)
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
