"""A source layer and what its inputs make of it, worked out once for all of its candidates.

An augmented input `z = [x; 1]` of `n` numbers has the second moment `M = R Rᵀ`, so for any rows `a`, `b` (·, n) that act on it

    E[(a z)(b z)ᵀ] = a M bᵀ = (a R)(b R)ᵀ.

Rows are kept twice, side by side, as `[a, a R]` (·, 2n): what is linear in rows acts on both halves at once, and a second
moment is a plain product of the second halves. The mean E[a z] is `a R` times a unit vector, the last row of `R`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.lowrank import power_and_inverse, square_root, times_triangular
from kvfold.surgery.rope import from_complex, to_complex

Made = TypeVar("Made")


@dataclass(frozen=True)
class Layer:
    """Attributes:
    weights: the attention, in the dtype in which all is worked out.
    moment: E[z zᵀ] (d + 1, d + 1), float64.
    phase: what each head's attention leaves of every frequency on average, (H, D/2) complex, of the weights' precision.
    held: what `once` made last.
    """

    weights: AttentionWeights
    moment: Tensor
    phase: Tensor
    held: dict[str, tuple[tuple[Any, ...], Any]] = field(default_factory=dict, compare=False)

    def once(self, what: str, of: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What `make` made of the same values and the same tensors the last time, or makes now: candidates differ in little."""
        before, made = self.held.get(what, ((), None))
        same = (a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(before, of, strict=True))
        if len(before) != len(of) or not all(same):
            made = make()
            self.held[what] = of, made
        found: Made = made
        return found

    @cached_property
    def root(self) -> Tensor:
        """R (n, n), lower triangular."""
        return square_root(self.moment).to(self.weights.k)

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of queries (H, D, 2n), keys and values (G, D, 2n)."""
        q, k, v = (self.both(rows) for rows in self.weights.augmented())
        return q, k, v

    def both(self, rows: Tensor) -> Tensor:
        """Rows `a` (·, n) as `[a, a R]` (·, 2n)."""
        return torch.cat([rows, times_triangular(rows, self.root)], -1)

    def seen(self, rows: Tensor, centred: bool = False) -> Tensor:
        """The half `a R` of rows (·, 2n), without what their mean makes of it where `centred`."""
        second = rows[..., len(self.root) :]
        return second - self.mean(rows)[..., None] * self.root[-1] if centred else second

    def plain(self, rows: Tensor) -> Tensor:
        """The half `a` of rows (·, 2n)."""
        return rows[..., : len(self.root)]

    def mean(self, rows: Tensor) -> Tensor:
        """E[a z] of rows (·, 2n)."""
        return rows[..., len(self.root) :] @ self.root[-1]

    def deviations(self, rows: Tensor) -> Tensor:
        """Rows (·, 2n) of `a z - E[a z]`: the constant input takes it."""
        constant = torch.cat([torch.zeros_like(self.root[-1]), self.root[-1]])
        constant[len(self.root) - 1] = 1
        return rows - self.mean(rows)[..., None] * constant

    @cached_property
    def query_energy(self) -> Tensor:
        """E|q|² of both numbers of every frequency's pair, (H, D/2): a rotation turns them into each other."""
        return self.seen(self.rows[0]).square().sum(-1).unflatten(1, (2, -1)).sum(1)

    @cached_property
    def key_gram(self) -> Tensor:
        """E[k_a k̄_b] of key heads a, b at every frequency, (D/2, G, G) complex."""
        return self._key_products(centred=False)

    @cached_property
    def key_covariance(self) -> Tensor:
        """The same of their deviations from the mean."""
        return self._key_products(centred=True)

    def _key_products(self, centred: bool) -> Tensor:
        pairs = to_complex(self.seen(self.rows[1], centred))
        return torch.einsum("afm,bfm->fab", pairs, pairs.conj())

    @cached_property
    def reading(self) -> tuple[Tensor, Tensor]:
        """The square root of the second moment of the queries that read a key head, turned by their phase, and its inverse:
        (G, D, D) each."""
        per, width = self.weights.heads // self.weights.kv_heads, self.weights.head_dim
        queries = from_complex(self.phase[..., None] * to_complex(self.seen(self.rows[0])))  # (H, D, n)
        return power_and_inverse((queries @ queries.mT).unflatten(0, (-1, per)).sum(1) / width, 0.5)

    @cached_property
    def importance(self) -> Tensor:
        """What a value's numbers do to the output: `W_Oᵀ W_O` (G, D, D), summed over the heads that read it."""
        o = self.weights.o
        return (o.mT @ o).unflatten(0, (self.weights.kv_heads, -1)).sum(1)
