"""MFA and MFA-KR (2412.19255): any RoPE attention → one wide key, and one wide value or none of its own.

MFA is latent attention without position-free keys, `mfa`: the rotary key is the wide key `S_K`, the latent the wide value
`S_V`, and the heads' maps `Q_h` and `W_O` absorb the rest. MFA-KR, `mfa_kr`, caches the key alone, before it turns, and reads
values from it: `v = (I + diag(α) N) k`. A source's keys say little of its values, so part of the key may keep still, pairs of
frequency zero, and be chosen for what the values need. Such a key contains MLA of the same width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kvfold.surgery.designs import LatentWeights, ReusedKeyWeights
from kvfold.surgery.latent import Choice, Tries, assemble, fold, joint_latent, rotary_slots
from kvfold.surgery.layer import Layer
from kvfold.surgery.lowrank import regression
from kvfold.surgery.rope import from_complex

START = {
    "mfa": Choice(slots=0.0, values=0.0, balance=0.0, picked="energy", centred=True),
    "mfa-kr": Choice(slots=0.0, values=0.0, balance=0.3, picked="turning", centred=True, still=0.5),
}
STOCK_START = Choice(slots=0.0, values=0.0, balance=0.0)
STOCK: Tries = {"slots": (0.5, 1.0), "values": (0.5, 1.0)}
"""For a key that must hold the first frequencies, and an output without bias."""
TRIED: dict[str, Tries] = {
    "mfa": {"slots": (0.5, 1.0), "values": (0.5, 1.0), "picked": ("first", "turning")},
    "mfa-kr": {
        "still": (0.75, 0.25, 0.0),
        "balance": (0.0, 0.1, 1.0, 3.0, 10.0),
        "picked": ("energy", "first"),
        "slots": (0.5, 1.0),
        "values": (1.0,),
    },
}


def mfa(layer: Layer, width: int, choice: Choice = START["mfa"]) -> LatentWeights:
    """One wide key and one wide value of `width` numbers: latent attention with N = 0 and r = R = width.

    Raises:
        ValueError: `width` is odd, or above the G·D at which nothing is lost.
    """
    return fold(layer, min(width, layer.weights.k.shape[-1]), width, choice, position_free=False)


def mfa_kr(layer: Layer, width: int, choice: Choice = START["mfa-kr"]) -> ReusedKeyWeights:
    """One wide key of `width` numbers, a share `choice.still` of them without rotation, that serves as value too.

    Every head's value is read from the key before its rotation by linear regression, means apart where no sinks are; what that
    does not say is what the still part is chosen for, together with the keys' position-free rest. The regression is absorbed by
    the heads' maps, so N begins at zero, and α at one for training to move it.

    Raises:
        ValueError: `width` is odd, or above the 2·G·D that hold all keys and all values.
    """
    weights = layer.weights
    widest = weights.kv_heads * weights.head_dim
    if width % 2 or not 2 <= width <= 2 * widest:
        raise ValueError(f"width {width} must be even and between 2 and {2 * widest}")
    turning = min(widest, max(2, width - 2 * round(width * choice.still / 2)))
    still = width - turning
    apart = weights.sinks is None  # else attention weights do not sum to one
    slots = rotary_slots(layer, turning // 2, choice)
    values, cached = layer.rows[2], from_complex(slots.key)  # (G, D, 2n), (R, 2n)
    down, up_k = layer.plain(cached[:0]), values.new_zeros(*values.shape[:2], 0)
    if still:
        left = values - regression(layer.seen(values, apart), layer.seen(cached, apart)) @ cached
        rank = min(still, weights.k.shape[-1])  # no input has more to hold; zeros behind that
        down, up_k, _ = joint_latent(layer, slots.rest, left, rank, choice)
        down, up_k = F.pad(down, (0, 0, 0, still - rank)), F.pad(up_k, (0, still - rank))
    order = _halves_first(turning, still).to(cached.device)
    key = torch.cat([cached, layer.both(down)])[order]  # (C, 2n)
    up_v = regression(layer.seen(values, apart), layer.seen(key, apart))  # (G, D, C)
    mean = layer.mean(values - up_v @ key)  # (G, D)
    key = layer.plain(key)
    per = weights.heads // weights.kv_heads

    absorbed = assemble(layer, slots, down, up_k, up_k, position_free=still > 0)
    scale = (width / (absorbed.q_nope.shape[1] + turning)) ** 0.5  # of the new softmax's root against that of `assemble`
    free = absorbed.up_k.mT @ absorbed.q_nope  # (H, N, r)ᵀ (H, N, d) → (H, r, d)
    bias = absorbed.q_bias
    if bias is not None:
        nope = absorbed.q_nope.shape[1]
        free_bias = (absorbed.up_k.mT @ bias[:, :nope, None])[..., 0]
        bias = torch.cat([bias[:, nope:], free_bias], 1)[:, order] * scale
    still_pairs = slots.pairs.new_full((still // 2,), weights.head_dim // 2)
    return ReusedKeyWeights(
        q=torch.cat([absorbed.q_rope, free], 1)[:, order] * scale,
        key=key[:, :-1],
        pairs=torch.cat([slots.pairs, still_pairs]),
        reuse=key.new_zeros(width, width),
        alpha=key.new_ones(width),
        up_v=up_v.repeat_interleave(per, 0),
        o=weights.o,
        q_bias=bias,
        k_bias=key[:, -1] if key[:, -1].any() else None,
        o_bias=weights.o_bias_with(mean) if apart else weights.o_bias,
        **weights.softmax,
    )


def _halves_first(turning: int, still: int) -> Tensor:
    """Where the rows of `[turning; still]`, each half-split by itself, stand in one half-split key."""
    first = [*range(turning // 2), *range(turning, turning + still // 2)]
    second = [*range(turning // 2, turning), *range(turning + still // 2, turning + still)]
    return torch.tensor(first + second)
