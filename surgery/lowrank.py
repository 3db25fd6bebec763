"""Second moments and the small linear algebra that every fold shares."""

import math

import torch
from torch import Tensor

AT_ONCE = 2048
"""Tokens of a second moment that are multiplied at a time."""


class SecondMoment:
    """`E[z zᵀ]` of the augmented input `z = [x; 1]`, accumulated in float64: (d + 1, d + 1).

    The last row and column hold the mean, so one matrix serves weights with biases and covariances alike. `products` is the
    dtype in which so many tokens as `AT_ONCE` are multiplied.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", products: torch.dtype = torch.float64) -> None:
        self.products = products
        self.total = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take in tokens (..., d), each as often as `weights` (...) says, once without."""
        x = x.flatten(0, -2)
        weights = x.new_ones(len(x)) if weights is None else weights.flatten()
        for some, count in zip(x.split(AT_ONCE), weights.to(self.products).split(AT_ONCE), strict=True):
            z = torch.cat([some, torch.ones_like(some[:, :1])], 1).to(self.products)
            self.total += symmetric((z * count[:, None]).T, z)

    def value(self) -> Tensor:
        """The mean over the tokens seen. Raises ValueError when there were none."""
        if self.total[-1, -1] == 0:
            raise ValueError("no calibration tokens were seen")
        return self.total / self.total[-1, -1]


STRIP = 192
"""Rows of a symmetric product at a time."""


def symmetric(left: Tensor, right: Tensor) -> Tensor:
    """A product (m, n) @ (n, m) that is symmetric: what is above its diagonal is taken from below."""
    found = left.new_empty(len(left), len(left))
    for start in range(0, len(left), STRIP):
        rows = slice(start, start + STRIP)
        found[rows, : rows.stop] = left[rows] @ right[:, : rows.stop]
        found[:start, rows] = found[rows, :start].T
    return found


def times_triangular(rows: Tensor, lower: Tensor) -> Tensor:
    """A product (..., n) @ (n, n) with a lower triangular matrix, whose zeros are left out."""
    found = torch.empty_like(rows)
    for start in range(0, len(lower), STRIP):
        columns = slice(start, start + STRIP)
        found[..., columns] = rows[..., start:] @ lower[start:, columns]
    return found


def power_and_inverse(matrix: Tensor, power: float, floor: float = 1e-9) -> tuple[Tensor, Tensor]:
    """`A^power` and `A^-power` of positive semi-definite matrices (..., n, n), worked out in float64.

    Eigenvalues below `floor` times the largest are raised to it, so that the inverse stays bounded.
    """
    values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
    smallest = (values[..., -1:] * floor).clamp_min(torch.finfo(values.dtype).tiny)
    raised = values.maximum(smallest) ** power
    there, back = ((vectors * size[..., None, :]) @ vectors.mH for size in (raised, 1 / raised))
    return there.to(matrix), back.to(matrix)


ITERATED = 3072
"""From this size on, leading eigenvectors come from iterations on a few of them rather than from all."""


def iterates(size: int, rank: int) -> bool:
    """Whether so many leading eigenvectors of a matrix of this size come from iterations."""
    return size >= ITERATED and 6 * rank <= size


def top_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of Hermitian matrices (..., n, n) → (..., n, rank).

    Of a large positive semi-definite matrix (n, n) they span a subspace that holds as much of it as the exact one does, but for
    a share of `1e-4` of what that leaves.
    """
    return leading_subspace(matrix, rank)[..., :rank]


def leading_subspace(matrix: Tensor, rank: int, near: Tensor | None = None) -> Tensor:
    """`top_eigenvectors`, and behind them those that it has beside them: (..., n, m) with m of `rank` and more.

    `near` (n, m) is that of a matrix that is much like it.
    """
    if matrix.ndim == 2 and iterates(len(matrix), rank):
        return subspace_iteration(matrix, rank, near)
    return torch.linalg.eigh(matrix).eigenvectors.flip(-1)


def subspace_iteration(matrix: Tensor, rank: int, near: Tensor | None = None, share: float = 1e-4, most: int = 40) -> Tensor:
    """Rayleigh-Ritz on products of a random block with a positive semi-definite matrix (n, n) → (n, m), leading first, of which
    the `rank` first count.

    The block begins with `near` (n, m), where there is one, and something random: eigenvectors alone would stay what they are,
    though others may have come to be above them. It is filtered between the steps, which end when there is less to gain than
    `share` of the trace that is left outside, or when one gains no more than rounding. A Ritz value of residual `r` gains at
    most `|r|²` over its distance from what is outside (Parlett, The Symmetric Eigenvalue Problem, 11.7).
    """
    size = min(len(matrix), rank + max(16, rank // 4))
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(matrix), size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    if near is not None:
        known = near[:, :size]
        block[:, : known.shape[1]] = known + block[:, : known.shape[1]] * (FRESH / len(matrix) ** 0.5)
    block = matrix @ block
    trace, held, rounding = float(matrix.diagonal().sum()), 0.0, torch.finfo(matrix.dtype).eps
    for _ in range(most):
        block = torch.linalg.qr(block).Q
        product = matrix @ block
        values, turn = (found.flip(-1) for found in torch.linalg.eigh(block.mT @ product))
        block, product = block @ turn, product @ turn
        before, held = held, float(values[:rank].to(torch.float64).sum())
        residuals = (product - block * values)[:, :rank].square().sum(0)
        gain = float((residuals / (values[:rank] - values[-1]).clamp_min(torch.finfo(values.dtype).tiny)).sum())
        if gain <= share * (trace - held) or held - before <= trace * rounding:
            break
        block = chebyshev(matrix, block, product, values)
    return block


FRESH = 0.1
"""Size of the random part of what begins with a vector that is near."""
DEGREE = 4
"""Products with the matrix between two steps of `subspace_iteration`, at most."""


def chebyshev(matrix: Tensor, block: Tensor, product: Tensor, values: Tensor) -> Tensor:
    """The Chebyshev polynomial of a matrix (n, n) times a block (n, m) of Ritz vectors: it is at most one on eigenvalues from 0
    to the last of the Ritz `values` (m,), which the block leaves out, and grows fast behind them (Zhou, Saad, Tiago and
    Chelikowsky, 2006, doi:10.1016/j.jcp.2006.03.017).

    Its degree is such that the last of the block is not lost in the rounding of the first. `product` is matrix @ block.
    """
    rounding = torch.finfo(values.dtype).eps
    edge = values[-1].maximum(values[0] * rounding)
    grown = float(torch.acosh(2 * values[0] / edge - 1))
    degree = min(DEGREE, max(1, int(math.acosh(0.1 / rounding) / max(grown, rounding))))
    before, found = block, product * (2 / edge) - block
    for _ in range(degree - 1):
        before, found = found, torch.addmm(2 * found + before, matrix, found, beta=-1, alpha=float(4 / edge))
    return found


def leading_directions(rows: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The `rank` orthonormal directions that hold most of `E|rows z|²`: rows (m, n), moment (n, n) → (m, rank).

    They are the leading left singular vectors of `rows · moment^½`, taken from whichever Gram matrix is smaller.
    """
    if len(rows) <= len(moment):
        return top_eigenvectors(rows @ moment @ rows.mT, rank)
    return left_singular(rows @ square_root(moment), rank)


def square_root(moment: Tensor) -> Tensor:
    """The lower triangular `R` with `R Rᵀ = moment` (n, n)."""
    # With fewer tokens than numbers it is singular, and rounding takes it below zero: that of float64 or float32 products.
    for share in (1e-13, 1e-11, 1e-6):
        shifted = moment.clone()
        shifted.diagonal().add_(moment.diagonal().mean() * share + torch.finfo(moment.dtype).tiny)
        root, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return root
    values, vectors = torch.linalg.eigh(moment)
    return torch.linalg.qr((vectors * values.clamp_min(0).sqrt()).mT, mode="r").R.mT


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

    target (..., a, n), source (b, n). Worked out in float64.
    """
    dtype, target, source = target.dtype, target.to(torch.float64), source.to(torch.float64)
    gram = source @ source.mT
    shift = gram.diagonal().mean() * ridge + torch.finfo(gram.dtype).tiny
    gram = gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, source @ target.mT).mT.to(dtype)
