"""The losses of uptraining, on hidden states: logits exist for a piece of the tokens at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kvfold.surgery.output import PIECE_BYTES, capped


@dataclass(frozen=True)
class Objective:
    """`kl_weight · KL(teacher ‖ student) + ce_weight · cross-entropy`, in nats per token.

    With `top_k` the KL is that of the teacher's k most likely tokens and all others taken together: a lower bound,
    which needs no distribution of the teacher over the whole vocabulary. `cap` soft-caps the logits of both.
    """

    kl_weight: float
    ce_weight: float
    top_k: int | None = None
    cap: float | None = None

    def __call__(
        self,
        hidden: Tensor,
        head: nn.Linear,
        targets: Tensor,
        reference: Tensor | None = None,
        teacher_head: nn.Linear | None = None,
    ) -> dict[str, Tensor]:
        """Mean `loss`, `kl` and `ce` over all tokens.

        Args:
            hidden: (..., d), what the student's output embedding `head` reads.
            targets: (...), the next tokens.
            reference: the same as `hidden` of the teacher, read by `teacher_head`; None leaves the KL out.

        Of more than one piece, the backward pass computes the logits again instead of keeping them.
        """
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        reference = None if reference is None else reference.flatten(0, -2)

        def piece(rows: Tensor, row_targets: Tensor, row_reference: Tensor | None) -> tuple[Tensor, Tensor]:
            log_probs = F.log_softmax(capped(head(rows).float(), self.cap), dim=-1)  # (n, V)
            ce = -log_probs.gather(1, row_targets[:, None]).sum()
            if row_reference is None or teacher_head is None:
                return ce.new_zeros(()), ce
            with torch.no_grad():
                wanted = capped(teacher_head(row_reference).float(), self.cap)
            return divergence(wanted, log_probs, self.top_k), ce

        size = max(1, PIECE_BYTES // (4 * head.out_features))
        starts = range(0, len(hidden), size)
        kl = ce = hidden.new_zeros((), dtype=torch.float32)
        for start in starts:
            rows = slice(start, start + size)
            inputs = (hidden[rows], targets[rows], None if reference is None else reference[rows])
            if len(starts) > 1 and hidden.requires_grad:
                part = checkpoint(piece, *inputs, use_reentrant=False)
            else:
                part = piece(*inputs)
            kl, ce = kl + part[0], ce + part[1]
        kl, ce = kl / len(hidden), ce / len(hidden)
        return {"loss": self.kl_weight * kl + self.ce_weight * ce, "kl": kl.detach(), "ce": ce.detach()}


def divergence(teacher_logits: Tensor, log_probs: Tensor, top_k: int | None = None) -> Tensor:
    """KL(teacher ‖ student) in nats, summed over the rows: (n, V) logits and (n, V) log-probabilities → ()."""
    teacher = F.log_softmax(teacher_logits, dim=-1)
    if top_k is None or top_k >= teacher.shape[-1]:
        return F.kl_div(log_probs, teacher, reduction="sum", log_target=True)
    likely, columns = teacher.topk(top_k, dim=-1)
    ours = log_probs.gather(1, columns)
    rest, our_rest = _log_remainder(likely), _log_remainder(ours)
    return (likely.exp() * (likely - ours)).sum() + (rest.exp() * (rest - our_rest)).sum()


def _log_remainder(log_probs: Tensor) -> Tensor:
    """log(1 − Σ p) of (n, k) log-probabilities → (n,); what is left of 1 may round to nothing."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp_max(1 - 1e-6))
