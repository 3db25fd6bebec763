"""MLA whose keys are rebuilt from the latent at every step and rotated then, so that RoPE stays exact.

The mildest way to a small cache, and the only one here that decoding pays for: `r·G·D` products per cached token and step.
"""

import torch
from torch import Tensor

from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.designs import RebuiltKeyWeights
from kvfold.surgery.latent import Choice, Tries, covariance, full_rank
from kvfold.surgery.lowrank import leading_directions, power_and_inverse

START = Choice(slots=0.5, values=0.5, balance=1.0, centred=True)
TRIED: Tries = {"balance": (0.1, 0.3, 3.0), "slots": (0.0, 1.0), "values": (0.0, 1.0)}


def rebuilt(weights: AttentionWeights, rank: int, moment: Tensor, choice: Choice = START) -> RebuiltKeyWeights:
    """One layer with a latent of `rank` numbers for keys and values together: their leading joint directions.

    Keys are weighted by (second moment of their queries, per frequency)^slots, values by `(W_Oᵀ W_O)^values`, and `balance`
    weighs the keys' energy against the values'. Means are kept apart as biases.

    Raises:
        ValueError: a `rank` above the full rank of keys and values.
    """
    per, width = weights.heads // weights.kv_heads, weights.head_dim
    if not 1 <= rank <= full_rank(weights.k.shape[-1], weights.kv_heads, width):
        raise ValueError(f"rank {rank} must lie between 1 and the full rank of keys and values")
    q, k, v = weights.augmented()
    spread, mean = covariance(moment), moment[:, -1]
    # A rotation turns both numbers of a pair into each other: only the sum of their energies tells.
    energy = ((q @ moment) * q).sum(-1).unflatten(1, (2, -1)).sum(1).repeat(1, 2)  # (H, D)
    reading = torch.diag_embed(energy.unflatten(0, (-1, per)).sum(1))  # (G, D, D)
    importance = (weights.o.mT @ weights.o).unflatten(0, (-1, per)).sum(1)
    root_k, inverse_k = power_and_inverse(reading, choice.slots / 2)
    root_v, inverse_v = power_and_inverse(importance, choice.values / 2)
    keys, values = root_k @ k, root_v @ v
    energies = [((x @ spread) * x).sum().clamp_min(torch.finfo(x.dtype).tiny) for x in (keys, values)]
    balance = (choice.balance * energies[1] / energies[0]).sqrt()
    stacked = torch.cat([balance * keys, values]).flatten(0, 1)  # (2·G·D, n)
    basis = leading_directions(stacked, spread, rank)
    down = basis.mT @ stacked
    down[:, -1] -= down @ mean  # the latent holds deviations from the mean
    level = ((down @ moment) * down).sum().clamp_min(torch.finfo(down.dtype).tiny).div(rank).rsqrt()
    up_k, up_v = basis.unflatten(0, (2, -1, width))
    constant = torch.einsum("hdi,hi->d", weights.o, (v @ mean).repeat_interleave(per, 0))
    return RebuiltKeyWeights(
        q=weights.q,
        down=(down * level)[:, :-1],
        up_k=inverse_k @ up_k / balance / level,
        up_v=inverse_v @ up_v / level,
        o=weights.o,
        q_bias=weights.q_bias,
        kv_bias=(down * level)[:, -1],
        k_bias=k @ mean,
        o_bias=constant if weights.o_bias is None else weights.o_bias + constant,
    )
