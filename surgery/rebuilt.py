"""MLA whose keys are rebuilt from the latent at every step and rotated then, so that RoPE stays exact.

The mildest way to a small cache, and the only one here that decoding pays for: `r·G·D` products per cached token and step.
"""

from dataclasses import replace

import torch

from kvfold.surgery.designs import RebuiltKeyWeights
from kvfold.surgery.latent import Choice, Tries, weighted_latent
from kvfold.surgery.layer import Layer
from kvfold.surgery.lowrank import power_and_inverse
from kvfold.surgery.names import full_rank

START = Choice(slots=0.5, values=0.5, balance=1.0, centred=True)
TRIED: Tries = {"balance": (0.1, 0.3, 3.0), "slots": (0.0, 1.0), "values": (0.0, 1.0)}


def rebuilt(layer: Layer, rank: int, choice: Choice = START) -> RebuiltKeyWeights:
    """One layer with a latent of `rank` numbers for keys and values together: their leading joint directions.

    Keys are weighted by (second moment of their queries, per frequency)^slots, values by `(W_Oᵀ W_O)^values`, and `balance`
    weighs the keys' energy against the values'. Means are kept apart as biases, but stay in the latent beside sinks, where
    attention weights do not sum to one.

    Raises:
        ValueError: a `rank` above the full rank of keys and values.
    """
    weights = layer.weights
    per, width = weights.heads // weights.kv_heads, weights.head_dim
    if not 1 <= rank <= full_rank(weights.k.shape[-1], weights.kv_heads, width):
        raise ValueError(f"rank {rank} must lie between 1 and the full rank of keys and values")
    _, k, v = layer.rows
    energy = layer.query_energy.repeat(1, 2)  # (H, D)
    reading = torch.diag_embed(energy.unflatten(0, (-1, per)).sum(1))  # (G, D, D)
    metric = power_and_inverse(reading, choice.slots / 2)
    apart = weights.sinks is None
    down, up_k, up_v = weighted_latent(layer, k, v, metric, rank, replace(choice, centred=apart))
    return RebuiltKeyWeights(
        q=weights.q,
        down=down[:, :-1],
        up_k=up_k,
        up_v=up_v,
        o=weights.o,
        q_bias=weights.q_bias,
        kv_bias=down[:, -1],
        k_bias=layer.mean(k) if apart else None,
        o_bias=weights.o_bias_with(layer.mean(v)) if apart else weights.o_bias,
        **weights.softmax,
    )
