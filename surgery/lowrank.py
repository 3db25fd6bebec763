"""Second moments and the small linear algebra that every fold shares."""

import torch
from torch import Tensor


class SecondMoment:
    """`E[z zᵀ]` of the augmented input `z = [x; 1]`, accumulated in float64: (d + 1, d + 1).

    The last row and column hold the mean, so one matrix serves weights with biases and covariances alike.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Take in tokens (..., d)."""
        x = x.flatten(0, -2).to(torch.float64)
        self.total[:-1, :-1] += x.T @ x
        self.total[-1, :-1] += x.sum(0)
        self.total[:-1, -1] += x.sum(0)
        self.total[-1, -1] += len(x)

    def value(self) -> Tensor:
        """The mean over the tokens seen. Raises ValueError when there were none."""
        if self.total[-1, -1] == 0:
            raise ValueError("no calibration tokens were seen")
        return self.total / self.total[-1, -1]


def power_and_inverse(matrix: Tensor, power: float, floor: float = 1e-9) -> tuple[Tensor, Tensor]:
    """`A^power` and `A^-power` of positive semi-definite matrices (..., n, n).

    Eigenvalues below `floor` times the largest are raised to it, so that the inverse stays bounded.
    """
    values, vectors = torch.linalg.eigh(matrix)
    smallest = (values[..., -1:] * floor).clamp_min(torch.finfo(values.dtype).tiny)
    raised = values.maximum(smallest) ** power
    return (vectors * raised[..., None, :]) @ vectors.mH, (vectors / raised[..., None, :]) @ vectors.mH


def top_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of Hermitian matrices (..., n, n) → (..., n, rank)."""
    return torch.linalg.eigh(matrix).eigenvectors[..., -rank:].flip(-1)
