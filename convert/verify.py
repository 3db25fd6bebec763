"""The last check of a conversion: does the written checkpoint compute, as transformers reads it, what was folded and healed?

Layer by layer, on a few tokens and the same inputs: on one side the source's layer with the written attention lifted back into
its design, on the other the class that the written config names, with the written tensors. A layout that says something else
than the design, a config that means another model, a tensor in the wrong place show as a difference here.
"""

from typing import Any

import torch
from torch import Tensor

from kvfold.convert.conversion import Conversion, Report
from kvfold.convert.layouts import modeling_kvfold  # noqa: F401 — registers our layout with transformers
from kvfold.convert.layouts.deepseek_v3 import residual_scale
from kvfold.convert.source.stream import SourceModel, StreamedModel
from kvfold.errors import ConversionError, UserError
from kvfold.surgery.designs import design

TOKENS = 128
LOGITS = 16
"""Tokens, the last of these, whose logits are compared."""
CHEAP = 512 << 20
"""Bytes of a layer in float32 up to which a fold without text is verified too: it takes little more than a copy, of which this
would be the most in a large model."""
MOST_ERROR = 1e-3
"""Squared and relative to what a layer adds. Rounding gives 1e-5, another RoPE or another norm 1e-2 and more."""


@torch.no_grad()
def verify(job: Conversion, config: dict[str, Any], ids: Tensor | None, device: torch.device, report: Report) -> None:
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
    length = min(TOKENS, plan.spec.max_positions)
    drawn = torch.randint(plan.spec.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    few = drawn if ids is None else ids[:1, :length]
    source = SourceModel(job.reader, plan.family, device, few.shape[1])
    target = StreamedModel(config, plan.family.reading(job.writer.names, job.writer.read), device, few.shape[1])
    scale = residual_scale(plan) if plan.layout == "deepseek_v3" else 1.0  # of the target's residual stream
    states = source.embed(few).data.to(device)
    for layer in range(layers) if ids is not None else sorted({0, layers - 1}):
        report(0.99, f"layer {layer + 1}/{layers}: verifying")
        block = source.block(layer)
        if layer in plan.folded:
            block.set_attention(design(job.read_written(layer).to(device, torch.float32)))
        after = block(states)
        del block  # one layer at a time
        if not after.isfinite().all():
            kind = UserError if ids is None else ConversionError  # work that took hours is kept
            raise kind(f"layer {layer} gives NaN or infinity on some tokens: check the source's weights there")
        _refuse_other(target.block(layer)(states * scale) / scale - after, after - states, f"layer {layer}")
        states = after
    states = states[:, -LOGITS:]
    wanted, got = _logits(source.outward(states), source.head()), _logits(target.outward(states * scale), target.head())
    _refuse_other(got - wanted, wanted, "the output embedding")


def _logits(states: Tensor, table: Tensor) -> Tensor:
    """States (B, T, d) by an output embedding (V, d) in whatever dtype, some rows at a time."""
    return torch.cat([states @ rows.to(states).T for rows in table.split(4096)], -1)


def _refuse_other(difference: Tensor, wanted: Tensor, where: str) -> None:
    error = float(difference.double().square().sum() / wanted.double().square().sum().clamp_min(1e-300))
    if not error <= MOST_ERROR:
        raise ConversionError(
            f"{where} of the written checkpoint computes something else than was folded (relative error {error:.1e}): that is "
            "a fault of kvfold, please report it with the source's config.json; --resume --no-verify finishes all the same"
        )
