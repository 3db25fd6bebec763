"""The methods by their names and the widths that they can have: numbers alone, for plans, which do without torch."""

GROUPING = ("mean", "first", "random", "align", "pca")
"""Ways to fewer key heads, `grouping.METHODS`."""
PUBLISHED = (
    "svd-split",
    "svd-joint",
    *(f"partial-rope-{rule}" for rule in ("high", "low", "uniform", "2norm")),
    "rorope",
    "whitened",
)
"""Published ways to MLA, `baselines.METHODS`."""
REBUILT = ("whitened",)
"""Those whose keys are rebuilt from the latent: all of the cache is its rank."""


def full_rank(hidden: int, kv_heads: int, head_dim: int) -> int:
    """The rank above which a latent has nothing more to hold."""
    return min(hidden, 2 * kv_heads * head_dim)


def rotary_width(method: str, kv_heads: int, head_dim: int, wanted: int) -> int:
    """The rotary width of a published method nearest to `wanted` from below, or else its least.

    MHA2MLA keeps as many pairs of every key head, 2·G numbers in all; TransMLA an even divisor of the head width (its code's
    `collapse`) or whole heads (its `rope_head`, with which the paper measures RoRoPE but not the whole conversion).
    """
    if method == "rorope":
        divisors = [r for r in range(2, head_dim, 2) if head_dim % r == 0]
        widths = divisors + [head_dim * heads for heads in range(1, kv_heads + 1)]
    else:
        widths = [2 * kv_heads * pairs for pairs in range(1, head_dim // 2 + 1)]
    return max((r for r in widths if r <= wanted), default=widths[0])
