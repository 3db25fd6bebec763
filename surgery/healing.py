"""Healing: distillation of folded attention against the original model's hidden states or its output.

No labels: the window's input comes from the folded model, its target from the original. A window of a few decoder layers is
brought near the original's hidden state behind it, so that every layer also repairs what the layers before it broke. The
window may also be the whole model, and the target the original's distribution of the next token.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

COARSE = 0.03
"""The relative error from which on healing takes full steps. What steps of a size break by themselves grows with its square."""
COARSE_KL = 0.5
"""The same in nats at the model's output."""
QUIET = 1e-2
"""Of a projection's median input channel: channels quieter than that are taken to be as loud."""
HELD_OUT = 16
"""One of so many windows is not healed on, and says what healing is worth: a text gone over often is learned by heart."""
LOOKS, PATIENCE = 12, 3
"""How often it is asked, and after how many rises in a row healing ends, in its second half: where the first steps are coarse,
the loss jumps, and falls below what it was only as the rate falls."""
Loss = Callable[[Tensor, Tensor], Tensor]
Total = Callable[..., list[Tensor]]
"""Of tensors their sums over all processes."""


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The squared error of each token's hidden state over that token's own energy, averaged: (..., d), (..., d) → ().

    The next layer normalises every token by itself, so a few tokens of huge norm must not outweigh the rest.
    """
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


def by_error(first_loss: float, coarse: float = COARSE) -> float:
    """Smaller steps where there is less to repair, by the root of the first loss over `coarse`."""
    return min(1.0, (first_loss / coarse) ** 0.5)


@dataclass
class Progress:
    """Where healing stands, enough to go on from: steps done, their losses, and the optimizer's state."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    optimizer: dict[str, Any] | None = None


def kept_back(windows: int) -> int:
    """How many of so many windows are not healed on: the first ones. One alone is healed on and measured on."""
    return min(windows // 2, max(1, windows // HELD_OUT))


@dataclass
class Looks:
    """What windows that are held out say of healing: the loss before it, the last one, the least, at which step that was and
    the parameters of then, and how many looks in a row the loss did not fall."""

    before: float
    last: float
    least: float
    step: int
    rises: int
    parameters: list[Tensor]

    @staticmethod
    def begun(before: float, parameters: Sequence[nn.Parameter]) -> "Looks":
        return Looks(before, before, before, 0, 0, [p.detach().clone() for p in parameters])

    @torch.no_grad()
    def behind(self, step: int, steps: int, measure: Callable[[], float], parameters: Sequence[nn.Parameter]) -> bool:
        """Look, where it is time to, behind one of so many steps; whether it was the last."""
        if step % -(-steps // LOOKS) == 0 or step == steps:
            loss = measure()
            self.rises, self.last = 0 if loss < self.last else self.rises + 1, loss
            if loss < self.least:
                self.least, self.step = loss, step
                for kept, p in zip(self.parameters, parameters, strict=True):
                    kept.copy_(p)
        return self.ended(step, steps)

    def ended(self, step: int, steps: int) -> bool:
        return step == steps or (2 * step >= steps and self.rises >= PATIENCE)

    @torch.no_grad()
    def restore(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put in the parameters of the least loss."""
        for p, kept in zip(parameters, self.parameters, strict=True):
            p.copy_(kept)

    def record(self) -> dict[str, float]:
        """What kvfold.json says of it."""
        return {"before": self.before, "after": self.least, "step": self.step}


class RelativeAdam:
    """Adam whose step is relative to what each parameter does.

    A step is `rate` times the root mean square of the parameter. For a projection both are measured with its columns
    multiplied by the root mean square of its input channels, so that the scale of a channel is of no account: a channel a
    thousand times as loud, with weights a thousandth, gets steps of a thousandth.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.parameters: list[nn.Parameter] = []
        self.loudness: dict[nn.Parameter, Tensor] = {}
        self.heard: dict[Any, Tensor] = {}
        self.hooks = []
        for module in modules:
            self.parameters += module.parameters()
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    heard = torch.zeros(linear.in_features + 1, device=linear.weight.device)
                    self.heard[linear.weight] = heard
                    self.hooks.append(linear.register_forward_pre_hook(self._listen))
        self.adam = torch.optim.Adam([{"params": [p]} for p in self.parameters], lr=0.0, betas=(0.9, 0.99), eps=1e-12)
        self.sizes: list[float] = []

    def _listen(self, linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add up the squares of a projection's input channels, and the tokens behind them: (in_features + 1,)."""
        weight: Any = linear.weight
        squares = inputs[0].detach().float().square().flatten(0, -2)
        self.heard[weight][:-1] += squares.sum(0)
        self.heard[weight][-1] += len(squares)

    def forget(self) -> None:
        """What was heard, where a first step is begun again."""
        for heard in self.heard.values():
            heard.zero_()

    def measure(self, total: Total) -> None:
        """Fix the sizes of steps, behind the forward passes of the first step and before it is done."""
        for hook in self.hooks:
            hook.remove()
        for weight, heard in zip(self.heard, total(*self.heard.values()), strict=True):
            if heard[-1] > 0:
                loud = (heard[:-1] / heard[-1]).sqrt()
                self.loudness[weight] = loud.clamp_min(float(loud.median()) * QUIET).clamp_min(1e-8)
        self.heard = {}
        self.sizes = [
            float((p.detach() * self.loudness.get(p, 1.0)).square().mean().sqrt().clamp_min(1e-8)) for p in self.parameters
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        before = [p.detach().clone() for p in self.parameters]
        for group, p, gradient, size in zip(self.adam.param_groups, self.parameters, gradients, self.sizes, strict=True):
            group["lr"] = rate * size
            p.grad = gradient / self.loudness.get(p, 1.0)
        self.adam.step()
        for p, old in zip(self.parameters, before, strict=True):
            if p in self.loudness:
                p.copy_(old + (p - old) / self.loudness[p])
            p.grad = None

    def state(self) -> dict[str, Any]:
        """All that a later run needs beside the parameters."""
        return {
            "adam": self.adam.state_dict(),
            "sizes": self.sizes,
            "loudness": [self.loudness.get(p) for p in self.parameters],
        }

    def restore(self, state: dict[str, Any]) -> None:
        for hook in self.hooks:
            hook.remove()
        self.adam.load_state_dict(state["adam"])
        self.sizes = state["sizes"]
        pairs = zip(self.parameters, state["loudness"], strict=True)
        self.loudness = {p: loud.to(p.device) for p, loud in pairs if loud is not None}


def drawn(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows (size,) of one step after the other, without end; each is drawn once before any is drawn again, but for those
    that do not make a whole step.

    A step has one row of every residue modulo `size`, so that processes of which each holds every n-th have as much to do.
    """
    while True:
        strata = [torch.arange(first, rows, size) for first in range(size)]
        orders = [rows_of[torch.randperm(len(rows_of), generator=generator)[: rows // size]] for rows_of in strata]
        yield from torch.stack(orders, 1)


def heal(
    window: Sequence[Callable[[Tensor], Tensor]],
    trained: Iterable[nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float = 2e-2,
    loss: Loss = relative_error,
    scale: Callable[[float], float] = by_error,
    piece: int | None = None,
    autocast: torch.dtype | None = None,
    report: Callable[[int, float], None] | None = None,
    begun: Progress | None = None,
    keep: Callable[[Progress], bool] | None = None,
    rows: int | None = None,
    total: Total = lambda *tensors: list(tensors),
    unheard: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train the modules `trained` in place so that the window maps each batch's input to its target; returns the losses.

    Args:
        window: the blocks in order, each (B, T, d) → (B, T, d).
        trained: the modules in them that learn, by `RelativeAdam`; warm-up over 5 % of the steps, then cosine to zero.
        batches: pairs of the window's input and target; `steps` of them are drawn, those that are still to do.
        scale: what the learning rate is multiplied by, from the first loss.
        piece: rows of a batch that run at a time, None for all; fewer where the device's memory is too small for them.
        autocast: dtype of the matrix products, None for the tensors' own. bfloat16 is several times as fast where the
            processor has it; parameters, their gradients and the hidden states between blocks stay as they are.
        report: called with the step and its loss.
        begun: where an interrupted run stood; the parameters must be those of then.
        keep: called behind every step with what `begun` wants, for whoever writes it down now and then; it says whether that
            step was the last.
        rows: of a step, where `batches` give only those that this process has, maybe none; None where each is a whole step.
        total: sums over the processes that have the others.
        unheard: called before the first step whose passes no hook of the optimizer listens to, which is the second of all.

    Raises:
        FloatingPointError: the loss stopped being finite.
        torch.OutOfMemoryError: not even one row fits into the device's memory.
    """
    optimizer = RelativeAdam(trained)
    progress = begun or Progress()
    if progress.optimizer is not None:
        optimizer.restore(progress.optimizer)
    warmup, unheard_from = max(1, steps // 20), max(1, progress.steps)

    def slope(hidden: Tensor, target: Tensor, size: int) -> tuple[float, list[Tensor]]:
        """The loss and its gradients, `size` rows at a time."""
        value, gradients = 0.0, [torch.zeros_like(p) for p in optimizer.parameters]
        for part, wanted in zip(hidden.split(size), target.split(size), strict=True):
            if not len(part):  # other processes have all rows of this step
                continue
            with torch.autocast(part.device.type, autocast, enabled=autocast is not None):
                output = part
                for block in window:
                    output = block(output)
            error = loss(output.to(wanted.dtype), wanted) * (len(part) / (rows or len(hidden)))
            value += float(error.detach())
            # Blocks may hold frozen weights; only what is trained needs a gradient.
            for gradient, found in zip(gradients, torch.autograd.grad(error, optimizer.parameters), strict=True):
                gradient += found
        return value, gradients

    for step, (hidden, target) in zip(range(progress.steps, steps), batches, strict=False):
        if step == unheard_from:
            unheard()
        size = max(1, min(piece or len(hidden), len(hidden)))
        while True:
            try:
                value, gradients = slope(hidden, target, size)
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            piece = size = size // 2  # behind the handler, whose exception holds on to what did not fit
            torch.cuda.empty_cache()
            optimizer.forget()
        losses, *gradients = total(torch.tensor(value, dtype=torch.float64), *gradients)
        value = float(losses)
        if not math.isfinite(value):
            raise FloatingPointError(f"healing diverged at step {step + 1} of {steps}: loss {value}")
        if step == 0:
            optimizer.measure(total)
        progress.losses.append(value)
        rate = learning_rate * scale(progress.losses[0])
        optimizer.step(gradients, rate * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))))
        progress.steps = step + 1
        if report is not None:
            report(step, value)
        if keep is not None:
            progress.optimizer = optimizer.state()
            if keep(progress):
                break
    return progress.losses
