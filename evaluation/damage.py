"""Damage: how much worse a folded model predicts than its source, token by token on the same held-out windows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvfold.convert.source.stream import last_states, logits_of

HEAD_TOKENS = 256
"""Tokens whose logits exist at one time, whatever the window: 125 MiB in float32 with a vocabulary of 128k. Scoring holds
at most six such tensors, so under 1 GiB there."""
RESAMPLES = 2000


@dataclass(frozen=True)
class TokenScores:
    """Per predicted token, (rows, T - 1) each, float32.

    Attributes:
        nll: −log p(token) in nats.
        kl: KL(source ‖ model) of the next-token distributions, in nats.
        agrees: 1 where both models' most likely token is the same.
    """

    nll: Tensor
    kl: Tensor
    agrees: Tensor

    @classmethod
    def joined(cls, parts: Sequence["TokenScores"]) -> "TokenScores":
        """The scores of all rows, in order."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("nll", "kl", "agrees")))

    @property
    def mean_nll(self) -> float:
        return float(self.nll.double().mean())

    @property
    def mean_kl(self) -> float:
        return float(self.kl.double().mean())

    @property
    def top1_agreement(self) -> float:
        return float(self.agrees.double().mean())

    def perplexity(self) -> float:
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf

    def bits_per_byte(self, bytes_per_token: float | None) -> float | None:
        return None if bytes_per_token is None else self.mean_nll / math.log(2) / bytes_per_token


@torch.no_grad()
def final_states(
    model: PreTrainedModel, windows: Tensor, batch: int, report: Callable[[float], None] = lambda share: None
) -> Tensor:
    """What the output embedding reads: token windows (rows, T) → (rows, T - 1, d) on the CPU, the last position left out."""
    parts = []
    for done, ids in enumerate(windows.split(batch)):
        report(done * batch / len(windows))
        parts.append(last_states(model, ids.to(model.device)).cpu())
    return torch.cat(parts)


@torch.no_grad()
def score(source: PreTrainedModel, reference: Tensor, model: PreTrainedModel, folded: Tensor, windows: Tensor) -> TokenScores:
    """Score `model` against `source` on token windows (rows, T); every token but each row's first is predicted.

    `reference` and `folded` are the `final_states` of both. With `model` the source itself this gives the source's own
    scores. Logits are formed `HEAD_TOKENS` at a time.
    """
    columns = [states.flatten(0, 1).split(HEAD_TOKENS) for states in (reference, folded)]
    targets = windows[:, 1:].flatten().split(HEAD_TOKENS)
    pieces = []
    for ours, theirs, target in zip(*columns, targets, strict=True):
        log_probs = _log_probs(source, ours), _log_probs(model, theirs)
        pieces.append(_compare(*log_probs, target.to(model.device)))
    nll, kl, agrees = (torch.cat(column).view(len(windows), -1).cpu() for column in zip(*pieces, strict=True))
    return TokenScores(nll, kl, agrees)


def _log_probs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(n, d) → (n, V) in float32."""
    return F.log_softmax(logits_of(model, hidden.to(model.device)), dim=-1)


def _compare(reference: Tensor, folded: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nll = -folded.gather(1, targets[:, None])[:, 0]
    kl = (reference.exp() * (reference - folded)).sum(-1).clamp_min(0)
    agrees = (reference.argmax(-1) == folded.argmax(-1)).float()
    return nll, kl, agrees


def interval(values: Tensor, share: float = 0.95) -> list[float] | None:
    """The bootstrap percentile interval of the mean over windows (Efron 1979), the same at every call.

    Tokens of one window depend on each other, so whole windows are drawn.

    Args:
        values: (rows, n), rows the windows.

    Returns:
        Both ends, or None for fewer than two windows.
    """
    means = values.double().mean(1)
    if len(means) < 2:
        return None
    drawn = torch.randint(len(means), (RESAMPLES, len(means)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64)
    return means[drawn].mean(1).quantile(ends).tolist()


def position_edges(length: int, bins: int = 16) -> list[int]:
    """Ends of `bins` stretches of the positions 1 … length, 0 first, as equal as they can be; fewer when it is short."""
    bins = min(bins, length)
    return [round(i * length / bins) for i in range(bins + 1)]


def by_position(values: Tensor, edges: Sequence[int]) -> list[float]:
    """The mean of `values` (rows, n) over each stretch between two edges."""
    return [float(values[:, a:b].double().mean()) for a, b in pairwise(edges)]
