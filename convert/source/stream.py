"""A model, one decoder layer at a time, over the calibration tokens.

transformers builds the model on the meta device, which costs no memory; a layer's tensors are read when it is that layer's
turn. What a layer is called with is what the model's own class calls it with.
Everything runs in float32, whatever the checkpoint's dtype.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kvfold.convert import processes
from kvfold.convert.families import Family
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.model import build_on_meta, fill_buffers
from kvfold.errors import ConversionError
from kvfold.surgery.kvfold_attention import Attention, Rope, attend, attention_of, exchange, half_split
from kvfold.surgery.output import capped

Result = TypeVar("Result")
WIDE = 512
"""Hidden size from which on bfloat16 pays where the CPU multiplies it."""
Watch = Callable[[slice, Tensor, Tensor, Tensor], None]
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")
"""What models call the norm behind their last layer."""


def forward_tokens(device: str, hidden: int) -> int:
    """Tokens in one forward pass, where they fit into the memory of the `device`, cuda or cpu. A CPU gains nothing by many of
    wide layers, and has to clear the memory that they take."""
    return 4096 if device == "cpu" and hidden >= 2048 else 8192


class HiddenStates:
    """Float32 activations (rows, T, d) of the calibration tokens: on the device where half of its free memory holds `copies` of
    them, else in the host's by the same measure, else in a mapped file.

    `shape` is that of all `windows` together, and `data` has those that this process holds. Layers are folded on the first
    `studied` of all, and the rest is there for healing. `weights` (rows, T) say how much each token of those counts in second
    moments; None means all alike. `forward_tokens` go through a layer at a time.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device, file: Path | None, copies: int = 1) -> None:
        self.windows = self.studied = shape[0]
        self.forward_tokens = forward_tokens(device.type, shape[-1])
        shape = (processes.held(shape[0]), *shape[1:])
        size = torch.Size(shape).numel()
        self.weights: Tensor | None = None
        if device.type == "cuda" and 4 * copies * size <= torch.cuda.mem_get_info(device)[0] // 2:
            self.data = torch.empty(shape, device=device)
        elif file is None or not size or not self.needs_disk(shape, copies):
            self.data = torch.empty(shape)
        else:
            file.unlink(missing_ok=True)
            if hasattr(os, "posix_fallocate"):  # a map of a file whose blocks the disk has not got would die of a signal
                with file.open("wb") as opened:
                    os.posix_fallocate(opened.fileno(), 0, 4 * size)
            self.data = torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(shape)

    @staticmethod
    def needs_disk(shape: tuple[int, int, int], copies: int) -> bool:
        """Whether `copies` of this shape would take more than half of the host's memory that is free now for this process."""
        return copies * 4 * torch.Size(shape).numel() > psutil.virtual_memory().available // processes.here() // 2

    def first(self, windows: int) -> Tensor:
        """What this process holds of the first so many of all windows."""
        return self.data[: processes.held(windows)]

    def batches(self, begin: int = 0, end: int | None = None) -> Iterator[slice]:
        """Rows that go through a layer together, none of both kinds."""
        rows, tokens, _ = self.data.shape
        end, step, edge = rows if end is None else end, max(1, self.forward_tokens // tokens), processes.held(self.studied)
        while begin < end:
            rows_of = slice(begin, min(end, begin + step, edge if begin < edge else end))
            yield rows_of
            begin = rows_of.stop

    def with_less(self, work: Callable[[], Result], tell: Callable[[str], None] = lambda line: None) -> Result:
        """`work()`, begun again with half the tokens in a forward pass as often as the device's memory is too small, down to
        one window; `tell` is told. Raises torch.OutOfMemoryError when that does not fit either."""
        rows, tokens, _ = self.data.shape
        before = self.forward_tokens = min(self.forward_tokens, rows * tokens)
        while True:
            try:
                result = work()
                break
            except torch.OutOfMemoryError:
                if self.forward_tokens // 2 < tokens:
                    raise
            self.forward_tokens //= 2  # behind the handler, whose exception holds on to what did not fit
            torch.cuda.empty_cache()
        if self.forward_tokens < before:
            tell(f"memory is short on the device: {self.forward_tokens:,} tokens go through a layer at a time from here on")
        return result


def quickly(hidden: Tensor, biased: bool) -> torch.autocast:
    """Around passes of many hidden states (..., d): a CPU that multiplies bfloat16 does so for wide layers, at three times the
    speed. The stream itself stays float32, as CUDA's does beside TF32. Not where attention has biases: those of keys may be a
    hundred times what tells keys apart (Qwen2.5), and that is lost in their rounding."""
    multiplies = torch.cpu._is_avx512_bf16_supported() and not biased
    return torch.autocast("cpu", torch.bfloat16, hidden.device.type == "cpu" and hidden.shape[-1] >= WIDE and multiplies)


class _WrittenOut(TorchFunctionMode):
    """What a model's class asks of PyTorch's fused attention goes through ours: see `attend` for where that is faster."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = _asked(*args, **kwargs or {}) if func is F.scaled_dot_product_attention else None
        return func(*args, **kwargs or {}) if asked is None else attend(*asked)


def _asked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float] | None:
    """The arguments of `scaled_dot_product_attention` as those of `attend`, None for what that does not do."""
    causal = is_causal and query.shape[2] == key.shape[2]
    if dropout_p or (attn_mask is None and not causal) or (attn_mask is not None and attn_mask.ndim != 4):
        return None
    return query.to(value), key.to(value), value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale


class _Caught(Exception):
    """What an attention was about to read."""


class Block:
    """One decoder layer as a map of hidden states (B, T, d) → (B, T, d) at positions 0…T-1, its attention exchangeable.

    `arguments` are what the model calls it with beside the hidden states: tables, masks, whatever its class wants. `positions`
    says how its attention reads the tables, see `kvfold_attention.half_split`. `trained` takes passes with gradients, of layer,
    states and arguments, where it is set.
    """

    trained: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor] | None = None

    def __init__(
        self, layer: nn.Module, arguments: dict[str, Any], device: torch.device, head_dim: int, positions: str
    ) -> None:
        self.layer, self.arguments, self.device = layer, arguments, device
        self.head_dim, self.positions = head_dim, positions
        self.biased = any(name.endswith("bias") for name, _ in attention_of(layer).named_parameters())

    def quickly(self, hidden: Tensor) -> torch.autocast:
        """As the function of this name."""
        return quickly(hidden, self.biased)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.trained is not None and torch.is_grad_enabled():
            return self.trained(self.layer, hidden, self.arguments)
        after: Tensor = self.layer(hidden, **self.arguments)
        return after

    @property
    def rope(self) -> Rope:
        """The tables (T, D) by which the attention turns queries and keys."""
        cos, sin = half_split(self.arguments["position_embeddings"], self.head_dim, self.positions)
        return cos[0], sin[0]

    @property
    def visible(self) -> Tensor | None:
        """Which keys each query may see (T, T), None for all before it and its own."""
        mask: Tensor | None = self.arguments.get("attention_mask")
        return mask if mask is None else (mask if mask.dtype == torch.bool else mask == 0)[0, 0]

    def set_attention(self, design: nn.Module) -> None:
        exchange(self.layer, design, self.positions)

    @contextmanager
    def attention(self, design: nn.Module) -> Iterator[None]:
        """A design in the attention's place for a while."""
        before = exchange(self.layer, design, self.positions)
        try:
            yield
        finally:
            exchange(self.layer, before)

    def mix(self, design: Attention, x: Tensor, asking: slice) -> Tensor:
        """The heads' outputs at the tokens `asking` of a design that is not in the layer, called as its attention is:
        (B, T, d) → (B, ·, H·D)."""
        some = None if asking == slice(None) else asking
        return design.mix(x, self.rope, self.arguments.get("attention_mask"), asking=some)

    def attention_input(self, hidden: Tensor) -> Tensor:
        """What the attention reads where the layer reads `hidden`."""

        def catch(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            raise _Caught(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        hook = attention_of(self.layer).register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self(hidden)
        except _Caught as caught:
            read: Tensor = caught.args[0]
            return read
        finally:
            hook.remove()
        raise AssertionError("a decoder layer calls its attention")

    def passed(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, d) → what the attention reads, what it gives, and what is behind the layer."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
            seen[:] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0]

        hook = attention_of(self.layer).register_forward_hook(keep, with_kwargs=True)
        try:
            with _WrittenOut() if hidden.device.type == "cpu" else nullcontext():
                after = self(hidden)
        finally:
            hook.remove()
        read, given = seen
        return read, given, after

    @torch.no_grad()
    def advance(
        self,
        states: HiddenStates,
        watch: Watch = lambda *_: None,
        tell: Callable[[str], None] = lambda line: None,
        known: tuple[Tensor, ...] = (),
    ) -> None:
        """Replace the hidden states before this layer by those behind it.

        What has been `passed` of the first rows may be `known`.
        `watch` sees of every batch that is studied which rows it has, the states before the layer, and what the attention reads
        and gives. Where memory is too small, `tell` is told and `watch` sees half of the batch again, so it must add nothing up
        before it has room for all.
        """
        done, studied, begin = 0, processes.held(states.studied), len(known[0]) if known else 0

        def go_on() -> None:
            nonlocal done
            for rows in chain(states.batches(done, begin), states.batches(max(done, begin))):
                hidden = states.data[rows].to(self.device)
                with self.quickly(hidden):
                    read, given, after = (part[rows] for part in known) if rows.stop <= begin else self.passed(hidden)
                if rows.stop <= studied:
                    watch(rows, hidden, read, given)
                states.data[rows] = after
                done = rows.stop

        states.with_less(go_on, tell)


@torch.no_grad()
def layer_calls(base: Any, **inputs: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
    """What a model without its head calls its decoder layers with, none of which is run: hidden states and all else."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def stub(hidden_states: Tensor, **arguments: Any) -> Tensor:
        calls.append((hidden_states, arguments))
        return hidden_states

    for layer in base.layers:
        layer.forward = stub
    try:
        base(**inputs, use_cache=False)
    finally:
        for layer in base.layers:
            del layer.forward
    return calls


def logit_scale(config: Any) -> float:
    """What a model multiplies its logits by, as its config says."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def logit_cap(config: Any) -> float | None:
    """What a model soft-caps its logits by, as its config says."""
    return getattr(config, "final_logit_softcapping", None) or None


def logits_of(causal: Any, states: Tensor) -> Tensor:
    """What the output embedding makes of `last_states`: (..., d) → (..., V) in float32."""
    return capped(causal.get_output_embeddings()(states).float(), logit_cap(causal.config))


def last_states(causal: Any, ids: Tensor) -> Tensor:
    """What the output embedding reads: (B, T) → (B, T - 1, d), the last position left out, for nothing follows it."""
    states: Tensor = causal.base_model(ids, use_cache=False).last_hidden_state[:, :-1]
    return states * logit_scale(causal.config)


class StreamedModel:
    """A model of transformers, one decoder layer at a time.

    Args:
        config: its config.json.
        read: its tensors by name.
        tokens: length of the windows that will be run.

    Raises UserError when transformers cannot build the model from its config.
    """

    def __init__(self, config: dict[str, Any], read: Callable[[str], Tensor], device: torch.device, tokens: int) -> None:
        self.read, self.device = read, device
        self.model: Any = build_on_meta(config).eval().requires_grad_(False)
        fill_buffers(self.model, device)
        self.base: Any = self.model.base_model
        # weakly: it would hold on to every layer that has been visited
        self.names = WeakKeyDictionary({module: name for name, module in self.model.named_modules()})
        self.norm: nn.Module = next(getattr(self.base, name) for name in FINAL_NORMS if hasattr(self.base, name))
        self._fill(self.norm)
        nothing = torch.zeros(1, tokens, self.model.config.hidden_size, device=device)
        self.arguments = [arguments for _, arguments in layer_calls(self.base, inputs_embeds=nothing)]

    def _fill(self, module: nn.Module) -> None:
        """Give a module its tensors, on the device in float32."""
        for name in list(module.state_dict()):
            value = self.read(f"{self.names[module]}.{name}")
            value = value.float() if value.is_floating_point() else value
            set_module_tensor_to_device(module, name, self.device, value=value)

    def beginning(self) -> Callable[[Tensor], Tensor]:
        """The map of token ids (B, T) to the hidden states before the first layer (B, T, d), on the device."""
        self._fill(self.base.get_input_embeddings())
        return lambda ids: layer_calls(self.base, input_ids=ids.to(self.device))[0][0]

    @torch.no_grad()
    def embed(self, ids: Tensor, file: Path | None = None, copies: int = 1) -> HiddenStates:
        """(rows, T) token ids of all windows → the hidden states before the first layer of those that this process holds, of
        which there will be so many `copies`.

        `file` holds those for which there is no memory.
        """
        begin = self.beginning()
        states = HiddenStates((*ids.shape, self.model.config.hidden_size), self.device, file, copies)
        ids = processes.share(ids)
        for rows in states.batches():
            states.data[rows] = begin(ids[rows])
        set_module_tensor_to_device(self.base.get_input_embeddings(), "weight", "meta")
        return states

    def head(self) -> Tensor:
        """The output embedding (V, d) as it is stored, its bias as a last column where it has one."""
        tied, output = self.model.config.tie_word_embeddings, self.model.get_output_embeddings()
        table = self.read(f"{self.names[self.model.get_input_embeddings() if tied else output]}.weight")
        if output.bias is None:
            return table
        return torch.cat([table, self.read(f"{self.names[output]}.bias")[:, None]], 1)

    def outward(self, hidden: Tensor) -> Tensor:
        """What `head` reads of the last layer's states (B, T, d): a bias reads a one."""
        states = self.norm(hidden) * logit_scale(self.model.config)
        biased = self.model.get_output_embeddings().bias is not None
        return torch.cat([states, torch.ones_like(states[..., :1])], -1) if biased else states

    def output(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """`outward`, and `head` in float32 on the device."""
        return self.outward, self.head().float().to(self.device)

    def block(self, layer: int) -> Block:
        """Layer `layer` with its weights, on the device in float32."""
        module = self.base.layers[layer]
        self.base.layers[layer] = nn.Identity()  # a layer is visited once: let its memory go with the block
        self._fill(module)
        width = int(getattr(attention_of(module), "head_dim", 0))
        return Block(module, self.arguments[layer], self.device, width, "halves")


class SourceModel(StreamedModel):
    """A source's layers on demand. `reader` must have passed `refuse_mismatch`."""

    def __init__(self, reader: CheckpointReader, family: Family, device: torch.device, tokens: int) -> None:
        super().__init__(reader.config, family.reading(reader.entries, reader.tensor), device, tokens)
        self.reader, self.spec = reader, family.spec(reader.config)

    def block(self, layer: int) -> Block:
        found = super().block(layer)
        found.head_dim, found.positions = self.spec.head_dim, self.spec.positions(layer)
        return found

    @torch.no_grad()
    def surprise(self, ids: Tensor) -> Tensor:
        """The source's own NLL of the token behind each of `ids` (rows, T), over its mean: (rows, T), the last of a row 1, for
        the rows that this process holds.

        It runs through the layers, so that this source can be used for nothing else.
        """
        states = self.embed(ids)
        for layer in range(len(self.base.layers)):
            self.block(layer).advance(states)
        norm, head = self.output()
        ids = processes.share(ids)
        weights = torch.ones(ids.shape)
        for row, targets in enumerate(ids.to(self.device)):
            logits = capped(norm(states.data[row, :-1].to(self.device)) @ head.T, logit_cap(self.model.config))
            weights[row, :-1] = nn.functional.cross_entropy(logits, targets[1:], reduction="none").cpu()
        weights[:, :-1] /= processes.mean(weights[:, :-1].mean(), len(ids))
        return weights


def check_finite(hidden: Tensor, where: str) -> None:
    """Raise ConversionError when hidden states, of whatever process, are not finite: weights or arithmetic are broken there."""
    if not torch.isfinite(*processes.total(hidden.sum().cpu())):
        raise ConversionError(f"hidden states behind {where} hold NaN or infinity: check the source's weights there")
