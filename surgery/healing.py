"""Healing: layer-local distillation of folded attention against the original model's hidden states.

No labels and no backpropagation through the model: a short window of decoder layers, its input from the already folded
prefix, its target the original's hidden state behind the window. So every layer also repairs what the layers before it
broke.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

COARSE = 0.03
"""The relative error from which on healing takes full steps. What steps of a size break by themselves grows with its square."""


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The squared error of each token's hidden state over that token's own energy, averaged: (..., d), (..., d) → ().

    The next layer normalises every token by itself, so a few tokens of huge norm must not outweigh the rest.
    """
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


def heal(
    window: Sequence[Callable[[Tensor], Tensor]],
    parameters: Iterable[nn.Parameter],
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float = 2e-2,
    loss: Callable[[Tensor, Tensor], Tensor] = relative_error,
    autocast: torch.dtype | None = None,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `parameters` in place so that the window maps each batch's input to its target; returns the loss curve.

    Args:
        window: the blocks in order, each (B, T, d) → (B, T, d).
        parameters: what is trained. Adam's step is `learning_rate` times each parameter's root mean square, so that one
            setting fits projections of every scale; warm-up over 5 % of the steps, then cosine to zero. Steps are smaller
            where there is less to repair, by the root of the first loss over `COARSE`.
        batches: pairs of the window's input and target; `steps` of them are drawn.
        autocast: dtype of the matrix products, None for the tensors' own. bfloat16 is several times as fast where the
            processor has it; parameters, their gradients and the hidden states between blocks stay as they are.
        report: called with the step and its loss.

    Raises:
        FloatingPointError: the loss stopped being finite.
    """
    trained = list(parameters)
    sizes = [float(p.detach().square().mean().sqrt().clamp_min(1e-8)) for p in trained]
    optimizer = torch.optim.Adam([{"params": [p]} for p in trained], betas=(0.9, 0.99))
    warmup = max(1, steps // 20)
    losses: list[float] = []
    for step, (hidden, target) in zip(range(steps), batches, strict=False):
        with torch.autocast(hidden.device.type, autocast, enabled=autocast is not None):
            for block in window:
                hidden = block(hidden)
        error = loss(hidden.to(target.dtype), target)
        value = float(error.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"healing diverged at step {step + 1} of {steps}: loss {value}")
        losses.append(value)
        rate = learning_rate * min(1.0, (losses[0] / COARSE) ** 0.5)
        rate *= min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = rate * size
        optimizer.zero_grad(set_to_none=True)
        # Blocks may hold frozen weights; only what is trained needs a gradient.
        for p, g in zip(trained, torch.autograd.grad(error, trained), strict=True):
            p.grad = g
        optimizer.step()
        if report is not None:
            report(step, value)
    return losses
