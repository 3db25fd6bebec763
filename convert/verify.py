"""The last check of a conversion: does the written checkpoint compute, as transformers reads it, what was folded and healed?

Layer by layer, on a few tokens and the same inputs: on one side the source's layer with the written attention lifted back into
its design, on the other the class that the written config names, with the written tensors. A layout that says something else
than the design, a config that means another model, a tensor in the wrong place show as a difference here.
"""

from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from kvfold.convert.job import Job, Report
from kvfold.convert.layouts import modeling_kvfold  # noqa: F401 — registers our layout with transformers
from kvfold.convert.layouts.deepseek_v3 import EMBEDDING, HEAD, residual_scale
from kvfold.convert.source import build_on_meta
from kvfold.convert.stream import Block, SourceModel
from kvfold.errors import ConversionError, UserError
from kvfold.surgery.designs import design

TOKENS = 128
CHEAP = 512 << 20
"""Bytes of a layer in float32 up to which a fold without text is verified too: it takes little more than a copy, of which this
would be the most in a large model."""
MOST_ERROR = 1e-3
"""Squared and relative to what a layer adds. Rounding gives 1e-5, another RoPE or another norm 1e-2 and more."""


@torch.no_grad()
def verify(job: Job, config: dict[str, Any], ids: Tensor | None, device: torch.device, report: Report) -> None:
    """Compare what is written with what was meant.

    Args:
        config: the target's config.json.
        ids: token windows (rows, T) whose beginning is run through all layers; None for the first and the last layer alone,
            on tokens drawn at random, where layers are small.

    Raises:
        UserError: the source itself gives no finite numbers, and there was no text that would have shown it before.
        ConversionError: they differ, or a folded layer gives no finite numbers.
    """
    plan, layers = job.plan, job.layers
    if plan.layout == "step3_text":  # transformers has no such class
        return
    prefix = plan.family.layer_prefix.format(layer=0)
    numbers = sum(entry.size // entry.dtype.itemsize for name, entry in job.reader.entries.items() if name.startswith(prefix))
    if ids is None and 4 * numbers > CHEAP:
        return
    length = min(TOKENS, plan.spec.reach)
    drawn = torch.randint(plan.spec.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    few = drawn if ids is None else ids[:1, :length]
    source = SourceModel(job.reader, plan.family, device, few.shape[1])
    target = _Target(job, config, device, few.shape[1])
    states = source.embed(few, None).data.to(device)
    for layer in range(layers) if ids is not None else sorted({0, layers - 1}):
        report(0.99, f"layer {layer + 1}/{layers}: verifying")
        block = source.block(layer)
        block.set_attention(design(job.read_written(layer).to(device, torch.float32)))
        after = block(states)
        if not after.isfinite().all():
            kind = UserError if ids is None else ConversionError  # work that took hours is kept
            raise kind(f"layer {layer} gives NaN or infinity on some tokens: check the source's weights there")
        _refuse_other(target.layer(layer)(states * target.scale) / target.scale - after, after - states, f"layer {layer}")
        states = after
    norm, head = source.base.norm, HEAD if HEAD in job.reader.entries and not plan.spec.tied else EMBEDDING
    _fill(norm, lambda name: job.reader.tensor(f"{source.prefix}norm.{name}"), device)
    wanted = _logits(norm(states), job.reader.tensor(head))
    _refuse_other(target.logits(states * target.scale) - wanted, wanted, "the output embedding")


class _Target:
    """The written checkpoint's layers on demand. `scale` is the factor on its residual stream."""

    def __init__(self, job: Job, config: dict[str, Any], device: torch.device, tokens: int) -> None:
        self.writer, self.device = job.writer, device
        self.model: Any = build_on_meta(config).eval().requires_grad_(False)
        self.scale = residual_scale(job.plan) if job.plan.layout == "deepseek_v3" else 1.0
        rotary = type(self.model.base_model.rotary_emb)(self.model.config).to(device)
        self.rope = rotary(torch.empty(1, device=device), torch.arange(tokens, device=device)[None])

    def layer(self, number: int) -> Block:
        module = self.model.base_model.layers[number]
        _fill(module, lambda name: self.writer.read(f"model.layers.{number}.{name}"), self.device)
        self.model.base_model.layers[number] = nn.Identity()
        return Block(module, self.rope)

    def logits(self, states: Tensor) -> Tensor:
        norm, tied = self.model.base_model.norm, self.model.config.tie_word_embeddings
        _fill(norm, lambda name: self.writer.read(f"model.norm.{name}"), self.device)
        return _logits(norm(states), self.writer.read(EMBEDDING if tied else HEAD))


def _logits(states: Tensor, table: Tensor) -> Tensor:
    """States (B, T, d) by an output embedding (V, d) in whatever dtype, some rows at a time."""
    return torch.cat([states @ rows.to(states).T for rows in table.split(4096)], -1)


def _fill(module: nn.Module, read: Any, device: torch.device) -> None:
    """Give a module on the meta device the tensors that `read` has for their names."""
    for name in list(module.state_dict()):
        value = read(name)
        set_module_tensor_to_device(module, name, device, value=value.float() if value.is_floating_point() else value)


def _refuse_other(difference: Tensor, wanted: Tensor, where: str) -> None:
    error = float(difference.double().square().sum() / wanted.double().square().sum().clamp_min(1e-300))
    if not error <= MOST_ERROR:
        raise ConversionError(
            f"{where} of the written checkpoint computes something else than was folded (relative error {error:.1e}): that is "
            "a fault of kvfold, please report it with the source's config.json; --resume --no-verify finishes all the same"
        )
