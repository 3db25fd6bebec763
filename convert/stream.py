"""The source model, one decoder layer at a time, over the calibration tokens.

transformers builds the model on the meta device, which costs no memory; a layer's tensors are read when it is that layer's
turn. Everything runs in float32, whatever the checkpoint's dtype.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from kvfold.convert.checkpoint import CheckpointReader
from kvfold.convert.families import Family
from kvfold.convert.source import build_on_meta
from kvfold.errors import ConversionError
from kvfold.surgery.rope import Rope

FORWARD_TOKENS = 8192
"""Tokens in one forward pass."""


class HiddenStates:
    """Float32 activations (rows, T, d) of all calibration tokens, in memory or in a mapped file when they do not fit.

    `weights` (rows, T) say how much each token counts in second moments; None means all alike.
    """

    def __init__(self, shape: tuple[int, int, int], file: Path | None) -> None:
        size = torch.Size(shape).numel()
        self.weights: Tensor | None = None
        if file is None:
            self.data = torch.empty(shape)
        else:
            file.unlink(missing_ok=True)
            if hasattr(os, "posix_fallocate"):  # a map of a file whose blocks the disk has not got would die of a signal
                with file.open("wb") as opened:
                    os.posix_fallocate(opened.fileno(), 0, 4 * size)
            self.data = torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(shape)

    @staticmethod
    def needs_disk(shape: tuple[int, int, int], copies: int = 2) -> bool:
        """Whether `copies` of this shape would take more than half of the memory that is free now."""
        return copies * 4 * torch.Size(shape).numel() > psutil.virtual_memory().available // 2

    def batches(self) -> Iterator[slice]:
        rows, tokens, _ = self.data.shape
        step = max(1, FORWARD_TOKENS // tokens)
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))


class FoldedAttention(nn.Module):
    """A kvfold design in the place of a transformers attention module."""

    def __init__(self, design: nn.Module) -> None:
        super().__init__()
        self.design = design

    def forward(self, hidden_states: Tensor, position_embeddings: Rope, **_: Any) -> tuple[Tensor, None]:
        cos, sin = position_embeddings
        return self.design(hidden_states, (cos[0], sin[0])), None


class Block(nn.Module):
    """One decoder layer as a map of hidden states (B, T, d) → (B, T, d) at positions 0…T-1, its attention exchangeable."""

    def __init__(self, layer: nn.Module, rope: Rope) -> None:
        super().__init__()
        self.layer: Any = layer
        self.rope = rope

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden, attention_mask=None, position_embeddings=self.rope)

    @property
    def device(self) -> torch.device:
        return self.rope[0].device

    def set_attention(self, design: nn.Module) -> None:
        self.layer.self_attn = FoldedAttention(design)

    @contextmanager
    def attention(self, design: nn.Module) -> Iterator[None]:
        """A design in the attention's place for a while."""
        before = self.layer.self_attn
        self.set_attention(design)
        try:
            yield
        finally:
            self.layer.self_attn = before

    def attend(self, x: Tensor) -> Tensor:
        """The attention's output on its normed inputs: (B, T, d) → (B, T, d)."""
        return self.layer.self_attn(hidden_states=x, attention_mask=None, position_embeddings=self.rope)[0]

    def attention_input(self, hidden: Tensor) -> Tensor:
        """What the attention reads: the layer's input after its norm."""
        return self.layer.input_layernorm(hidden)

    @torch.no_grad()
    def advance(self, states: HiddenStates) -> None:
        """Replace the hidden states before this layer by those behind it."""
        for rows in states.batches():
            states.data[rows] = self(states.data[rows].to(self.device)).cpu()


class SourceModel:
    """A checkpoint's layers on demand. Raises UserError when transformers cannot build the model from its config.

    `reader` must have passed `refuse_mismatch`.
    """

    def __init__(self, reader: CheckpointReader, family: Family, device: torch.device, tokens: int) -> None:
        self.reader, self.family, self.device = reader, family, device
        model = build_on_meta(reader.config).eval().requires_grad_(False)
        self.base: Any = model.base_model
        self.prefix = model.base_model_prefix + "."
        positions = torch.arange(tokens, device=device)[None]
        like = torch.empty(1, dtype=torch.float32, device=device)
        rotary = type(self.base.rotary_emb)(model.config).to(device)  # the model's own is on the meta device
        self.rope: Rope = rotary(like, positions)

    def embedding(self) -> Tensor:
        """The input embedding (V, d), on the CPU in float32."""
        return self.reader.tensor(self.prefix + "embed_tokens.weight").float()

    def embed(self, ids: Tensor, file: Path | None) -> HiddenStates:
        """(rows, T) token ids → the hidden states before layer 0."""
        table = self.embedding()
        states = HiddenStates((*ids.shape, table.shape[1]), file)
        for rows in states.batches():
            states.data[rows] = nn.functional.embedding(ids[rows], table)
        return states

    def output(self) -> tuple[nn.Module, Tensor]:
        """The norm behind the last layer, and the output embedding (V, d), on the device in float32."""
        norm = self.base.norm
        set_module_tensor_to_device(norm, "weight", self.device, value=self.reader.tensor(self.prefix + "norm.weight").float())
        name = "lm_head.weight" if "lm_head.weight" in self.reader.entries else self.prefix + "embed_tokens.weight"
        return norm, self.reader.tensor(name).float().to(self.device)

    @torch.no_grad()
    def surprise(self, ids: Tensor) -> Tensor:
        """The source's own NLL of the token behind each of `ids` (rows, T), over its mean: (rows, T), the last of a row 1.

        It runs through the layers, so that this source can be used for nothing else.
        """
        states = self.embed(ids, None)
        for layer in range(len(self.base.layers)):
            self.block(layer).advance(states)
        norm, head = self.output()
        weights = torch.ones(ids.shape)
        for row, targets in enumerate(ids.to(self.device)):
            logits = norm(states.data[row, :-1].to(self.device)) @ head.T
            weights[row, :-1] = nn.functional.cross_entropy(logits, targets[1:], reduction="none").cpu()
        weights[:, :-1] /= weights[:, :-1].mean()
        return weights

    def block(self, layer: int) -> Block:
        """Layer `layer` with its weights, on the device in float32."""
        module = self.base.layers[layer]
        self.base.layers[layer] = nn.Identity()  # a layer is visited once: let its memory go with the block
        prefix = self.family.layer_prefix.format(layer=layer)
        for name, _ in list(module.named_parameters()):
            set_module_tensor_to_device(module, name, self.device, value=self.reader.tensor(prefix + name).float())
        return Block(module.requires_grad_(False), self.rope)


def check_finite(hidden: Tensor, where: str) -> None:
    """Raise ConversionError when hidden states are not finite: the weights or the arithmetic are broken there."""
    if not torch.isfinite(hidden.sum()):
        raise ConversionError(f"hidden states behind {where} hold NaN or infinity: check the source's weights there")
