"""Rotary position embedding (2104.09864) as complex numbers.

In the half-split layout of transformers, dims `i` and `i + D/2` of a head form RoPE pair `i`. Read as one complex number
`z_i = x_i + j·x_{i+D/2}`, position `t` multiplies it by `e^{j f_i t}`, and the score of a query and a key is
`Σ_i Re(q_i · conj(k_i))`. Every complex-linear map inside one frequency, across heads too, commutes with the rotation.
"""

import torch
from torch import Tensor


def to_complex(weight: Tensor) -> Tensor:
    """(..., D, n) real rows, half-split → (..., D/2, n) complex rows, one per RoPE pair."""
    real, imag = weight.chunk(2, dim=-2)
    return torch.complex(real, imag)


def from_complex(weight: Tensor) -> Tensor:
    """The inverse of `to_complex`: (..., D/2, n) complex → (..., D, n) real, half-split."""
    return torch.cat([weight.real, weight.imag], dim=-2)
