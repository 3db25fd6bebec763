"""Biases for an attention that has none: a constant is read off the input, where it is nearly constant in some direction.

`w` minimises `E|w·x - 1|²` over the tokens, and `b wᵀ` on top of a weight stands for its bias `b`: exactly where some `w` has
`w·x = 1` for all tokens. What the softmax ignores (a constant over position-free keys) needs none of it, so a layer is folded
with its biases, its latent holding deviations of keys (`Choice.centred`), and `without_biases` comes last.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvfold.surgery.designs import LatentWeights

RIDGE = 1e-9
"""Relative to the mean square of each input channel."""


def constant_direction(moment: Tensor) -> Tensor:
    """The direction `w` (d,) along which inputs are most nearly 1, from their E[[x; 1] [x; 1]ᵀ] (d + 1, d + 1)."""
    gram = moment[:-1, :-1]
    ridge = RIDGE * gram.diagonal() + torch.finfo(gram.dtype).tiny
    return torch.linalg.solve(gram + torch.diag(ridge), moment[:-1, -1])


def off_one(direction: Tensor, moment: Tensor) -> float:
    """The root mean square of `w·x - 1`, for a direction (d,) and tokens of the second moment E[[x; 1] [x; 1]ᵀ]."""
    error = torch.cat([direction, -torch.ones_like(direction[:1])])
    return float((error @ moment @ error).clamp_min(0).sqrt())


def without_biases(folded: LatentWeights, direction: Tensor) -> LatentWeights:
    """`folded` with the biases of its queries, latent and rotary key read off the input along a direction (d,)."""
    if folded.q_bias is not None:
        queries = torch.cat([folded.q_nope, folded.q_rope], 1) + folded.q_bias[..., None] * direction
        q_nope, q_rope = queries.split([folded.q_nope.shape[1], folded.q_rope.shape[1]], 1)
        folded = replace(folded, q_nope=q_nope, q_rope=q_rope, q_bias=None)
    if folded.kv_bias is not None:
        cached = torch.cat([folded.down, folded.k_rope]) + folded.kv_bias[:, None] * direction
        down, k_rope = cached.split([len(folded.down), len(folded.k_rope)])
        folded = replace(folded, down=down, k_rope=k_rope, kv_bias=None)
    return folded
