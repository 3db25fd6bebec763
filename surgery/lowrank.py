"""Second moments and the small linear algebra that every fold shares."""

import torch
from torch import Tensor


class SecondMoment:
    """`E[z zᵀ]` of the augmented input `z = [x; 1]`, accumulated in float64: (d + 1, d + 1).

    The last row and column hold the mean, so one matrix serves weights with biases and covariances alike.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in tokens (..., d), each as often as `weights` (...) says, once without."""
        x = x.flatten(0, -2).to(torch.float64)
        counted = x if weights is None else x * weights.reshape(-1, 1).to(x)
        self.total[:-1, :-1] += symmetric(counted.T, x)
        self.total[-1, :-1] += counted.sum(0)
        self.total[:-1, -1] += counted.sum(0)
        self.total[-1, -1] += len(x) if weights is None else float(weights.sum())

    def value(self) -> Tensor:
        """The mean over the tokens seen. Raises ValueError when there were none."""
        if self.total[-1, -1] == 0:
            raise ValueError("no calibration tokens were seen")
        return self.total / self.total[-1, -1]


STRIP = 512
"""Rows of a symmetric product at a time."""


def symmetric(left: Tensor, right: Tensor) -> Tensor:
    """A product (m, n) @ (n, m) that is symmetric: what is above its diagonal is taken from below."""
    found = left.new_empty(len(left), len(left))
    for start in range(0, len(left), STRIP):
        rows = slice(start, start + STRIP)
        found[rows, : rows.stop] = left[rows] @ right[:, : rows.stop]
        found[:start, rows] = found[rows, :start].T
    return found


def power_and_inverse(matrix: Tensor, power: float, floor: float = 1e-9) -> tuple[Tensor, Tensor]:
    """`A^power` and `A^-power` of positive semi-definite matrices (..., n, n).

    Eigenvalues below `floor` times the largest are raised to it, so that the inverse stays bounded.
    """
    values, vectors = torch.linalg.eigh(matrix)
    smallest = (values[..., -1:] * floor).clamp_min(torch.finfo(values.dtype).tiny)
    raised = values.maximum(smallest) ** power
    return (vectors * raised[..., None, :]) @ vectors.mH, (vectors / raised[..., None, :]) @ vectors.mH


ITERATED = 3072
"""From this size on, leading eigenvectors come from iterations on a few of them rather than from all."""


def top_eigenvectors(matrix: Tensor, rank: int, near: Tensor | None = None) -> Tensor:
    """The `rank` leading eigenvectors of Hermitian matrices (..., n, n) → (..., n, rank).

    Of a large positive semi-definite matrix (n, n) they span a subspace that holds as much of it as the exact one does, but for
    a share of `1e-4` of what that leaves. `near` (n, m) are those of a matrix that is much like it.
    """
    if matrix.ndim == 2 and len(matrix) >= ITERATED and 6 * rank <= len(matrix):
        return subspace_iteration(matrix, rank, near)
    return torch.linalg.eigh(matrix).eigenvectors[..., -rank:].flip(-1)


def subspace_iteration(matrix: Tensor, rank: int, near: Tensor | None = None, share: float = 1e-4, most: int = 40) -> Tensor:
    """Rayleigh-Ritz on products of a random block with a positive semi-definite matrix (n, n) → (n, rank), leading first.

    The block begins with `near` (n, m), where there is one. It ends when a step adds less than `share` of the trace that is
    left outside (Halko et al., 0909.4061, section 4.5).
    """
    size = min(len(matrix), rank + max(16, rank // 4))
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(matrix), size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    if near is not None:
        block[:, : near.shape[1]] = near[:, :size]
    trace, held, vectors = float(matrix.diagonal().sum()), 0.0, block
    block = matrix @ block
    for _ in range(most):
        block = torch.linalg.qr(block).Q
        product = matrix @ block
        values, turn = torch.linalg.eigh(block.mT @ product)
        vectors, before, held = block @ turn[:, -rank:].flip(-1), held, float(values[-rank:].sum())
        if held - before <= share * max(trace - held, trace * 1e-12):
            break
        block = matrix @ product
    return vectors


def leading_directions(rows: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The `rank` orthonormal directions that hold most of `E|rows z|²`: rows (m, n), moment (n, n) → (m, rank).

    They are the leading left singular vectors of `rows · moment^½`, taken from whichever Gram matrix is smaller.
    """
    if len(rows) <= len(moment):
        return top_eigenvectors(rows @ moment @ rows.mT, rank)
    return left_singular(rows @ square_root(moment), rank)


def square_root(moment: Tensor) -> Tensor:
    """`R` with `R Rᵀ = moment` (n, n), lower triangular where the moment is not singular."""
    for share in (1e-13, 1e-12, 1e-11):  # with fewer tokens than numbers it is singular, and rounding takes it below zero
        shift = moment.diagonal().mean() * share + torch.finfo(moment.dtype).tiny
        identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        root, failed = torch.linalg.cholesky_ex(moment + shift * identity)
        if not failed:
            return root
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt()


def left_singular(rows: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors of (m, n) → (m, rank), from whichever Gram matrix is smaller."""
    if len(rows) <= rows.shape[1]:
        return top_eigenvectors(symmetric(rows, rows.mT), rank)
    return torch.linalg.qr(rows @ top_eigenvectors(symmetric(rows.mT, rows), rank)).Q


def gauge(down: Tensor, moment: Tensor | None = None) -> Tensor:
    """What to multiply a latent (r, n) by for E|c|² = r, the size that layouts and healing's steps count on; of white inputs
    without a moment."""
    energy = ((down if moment is None else down @ moment) * down).sum() / len(down)
    return energy.clamp_min(torch.finfo(energy.dtype).tiny).rsqrt()


def regression(target: Tensor, source: Tensor, ridge: float = 1e-9) -> Tensor:
    """The map (..., a, b) of least `|target - map source|²`, ridge relative to the source's mean energy.

    target (..., a, n), source (b, n).
    """
    gram = source @ source.mT
    shift = gram.diagonal().mean() * ridge + torch.finfo(gram.dtype).tiny
    gram = gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, source @ target.mT).mT
