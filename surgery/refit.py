"""The output projection that suits what a fold has left of the heads: a linear regression, which no training can beat.

A folded layer's heads differ from the source's, and `W_O` was made for the source's. Of all output projections that read the
folded heads, this finds the one whose output is nearest to the source's attention output on the calibration tokens.
"""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from kvfold.surgery.designs import FoldedWeights
from kvfold.surgery.lowrank import symmetric

Folded = TypeVar("Folded", bound=FoldedWeights)
RIDGE = 1e-2
"""Towards the projection that there is, relative to the mean energy of the heads' numbers."""


class OutputRegression:
    """Collects, token by token, what the regression needs, in float64. A CPU multiplies a batch of float32 tokens as they are,
    whose rounding is far below the ridge.

    `m` numbers of the heads side by side, `d` of the output. Each token's error counts relative to `1 / energy` of its hidden
    state, as the error behind a layer does.
    """

    def __init__(self, heads: int, hidden: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(heads + 1, heads + 1, dtype=torch.float64, device=device)  # the last row is the bias's
        self.cross = torch.zeros(heads + 1, hidden, dtype=torch.float64, device=device)

    def add(self, heads: Tensor, missing: Tensor, energy: Tensor) -> None:
        """Take in heads (..., m), what the present output lacks (..., d), and the squared norm of the hidden state (...)."""
        single = torch.float32 if heads.device.type == "cpu" else torch.float64  # products of a GPU may be TF32
        dtype = torch.promote_types(heads.dtype, single)
        z = torch.cat([heads, torch.ones_like(heads[..., :1])], -1).flatten(0, -2).to(dtype)
        counted = z / energy.reshape(-1, 1).clamp_min(torch.finfo(energy.dtype).tiny).to(z)
        gram, cross = symmetric(counted.T, z), counted.T @ missing.flatten(0, -2).to(dtype)
        self.gram += gram
        self.cross += cross

    def solve(self, folded: Folded, bias: bool) -> Folded:
        """`folded` with the output projection `W_O + Δ` that minimises `E|missing - Δ heads|² / energy + ridge |Δ|²`.

        Args:
            bias: whether the output may have a bias.
        """
        size = len(self.gram) if bias else len(self.gram) - 1
        gram, cross = self.gram[:size, :size], self.cross[:size]
        shift = gram.diagonal()[: len(self.gram) - 1].mean() * RIDGE + torch.finfo(gram.dtype).tiny
        ridge = torch.full_like(gram.diagonal(), float(shift))
        ridge[len(self.gram) - 1 :] = 0  # a bias is free
        gram = gram + torch.diag(ridge)
        root, failed = torch.linalg.cholesky_ex(gram.to(folded.o))
        if failed:  # the ridge is lost in float32 where a few directions of the heads outweigh all others
            root = torch.linalg.cholesky(gram)
        change = torch.cholesky_solve(cross.to(root), root).T.to(folded.o)  # (d, m [+ 1])
        heads = len(self.gram) - 1
        o = folded.o + change[:, :heads].unflatten(1, (folded.o.shape[0], -1)).permute(1, 0, 2)  # (H, d, D)
        if not bias:
            return replace(folded, o=o)
        return replace(folded, o=o, o_bias=change[:, -1] if folded.o_bias is None else folded.o_bias + change[:, -1])
