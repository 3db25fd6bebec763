"""Attention as it is written out: in pieces, with whatever scores go through, and of some tokens alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvfold.convert.calibration import in_turn
from kvfold.surgery import kvfold_attention
from kvfold.surgery.attention import GroupedAttention
from kvfold.surgery.kvfold_attention import LatentAttention, RebuiltKeyAttention, ReusedKeyAttention, attend
from kvfold.surgery.latent import along_diagonals
from tests.test_surgery import HEADS, HIDDEN, KV_HEADS, TOKENS, WIDTH, inputs, random_weights, rope_tables

CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
SLIDING = CAUSAL.triu(-6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, gains: Tensor, cap: Any, sinks: Any) -> Tensor:
    """One head of one row after the other."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for row in range(len(q)):
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            scores = q[row, head] @ k[row, group].T * scale * gains[row, group, :, 0]
            scores = scores if cap is None else cap * (scores / cap).tanh()
            weights = scores.masked_fill(~seen, -torch.inf).exp()
            whole = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[head].exp())
            out[row, head] = weights / whole @ v[row, group]
    return out


@pytest.mark.parametrize("scores", [1, 700, 1 << 24])
@pytest.mark.parametrize("few", [1, 1000])
@pytest.mark.parametrize("mask", ["none", "sliding", "additive", "empty", "one"])
@pytest.mark.parametrize("extra", [{}, {"cap": 0.7}, {"sinks": drawn(HEADS, seed=5)}])
def test_attention_in_pieces_is_attention(
    scores: int, few: int, mask: str, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many scores exist at a time, and by the fused kernel where that has them all."""
    monkeypatch.setattr(kvfold_attention, "SCORES", scores)
    monkeypatch.setattr(kvfold_attention, "FEW", few)
    q, k, v = drawn(2, HEADS, TOKENS, 10), drawn(2, KV_HEADS, TOKENS, 10, seed=1), drawn(2, KV_HEADS, TOKENS, 6, seed=2)
    gains, seen = drawn(2, KV_HEADS, TOKENS, 1, seed=3).exp(), SLIDING if mask in ("sliding", "additive") else CAUSAL
    given = None
    if mask == "empty":  # a static cache is longer than what it holds
        q, seen = q[:, :, :7], seen[:7]
    elif mask == "one":
        q, seen = q[:, :, -1:], seen[-1:]
    elif mask != "none":
        given = seen if mask == "sliding" else torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -1e9)
        given = given[None, None]
    wanted = by_definition(q, k, v, seen, 0.4, gains, extra.get("cap"), extra.get("sinks"))
    torch.testing.assert_close(attend(q, k, v, given, 0.4, gains, **extra), wanted)


NORM = {"kv_heads": KV_HEADS, "together": False, "eps": 1e-6}
DESIGNS: dict[str, Any] = {
    "latent": lambda: LatentAttention(HIDDEN, HEADS, rank=12, rope_dim=4, nope_dim=WIDTH, value_dim=WIDTH),
    "turned keys": lambda: LatentAttention(HIDDEN, HEADS, rank=12, rope_dim=4, nope_dim=WIDTH, value_dim=WIDTH, turned=3),
    "sized keys": lambda: LatentAttention(HIDDEN, HEADS, rank=12, rope_dim=4, nope_dim=WIDTH, value_dim=WIDTH, norm=NORM),
    "reused key": lambda: ReusedKeyAttention(HIDDEN, HEADS, 12, WIDTH),
    "rebuilt keys": lambda: RebuiltKeyAttention(HIDDEN, HEADS, 12, KV_HEADS, WIDTH, norm=NORM),
    "grouped": lambda: GroupedAttention(random_weights(bias=True)),
}


@pytest.mark.parametrize("visible", [None, SLIDING])
@pytest.mark.parametrize("name", DESIGNS)
@torch.no_grad()
def test_some_tokens_attend_as_they_do_among_all(name: str, visible: Tensor | None) -> None:
    attention, mask = DESIGNS[name]().double(), None if visible is None else visible[None, None]
    for number, parameter in enumerate(attention.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    whole = attention.mix(inputs(), rope_tables(), mask)
    for some in (slice(None), slice(2, None, 5), slice(9, 17)):
        found = attention.mix(inputs(), rope_tables(), mask, asking=some)
        torch.testing.assert_close(found, whole[:, some])


def test_windows_have_a_say_in_turn() -> None:
    """Every third token, each window beginning with another one; all of all where there is nothing to leave out."""
    seen = torch.zeros(7, 9, dtype=torch.int64)
    for rows, tokens in in_turn(torch.arange(7) * 2 + 1, 3):  # as the second of two processes has them
        assert len(torch.as_tensor(rows))
        for row in torch.as_tensor(rows):
            seen[row, tokens] += 1
    assert seen.sum(1).tolist() == [3] * 7 and seen.max() == 1
    assert [row.nonzero()[0].item() for row in seen] == [1, 0, 2, 1, 0, 2, 1]
    assert list(in_turn(torch.arange(7), 1)) == [(slice(None), slice(None))]


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_sums_along_diagonals(tokens: int) -> None:
    lower = drawn(3, tokens, tokens).tril()
    wanted = torch.stack([lower.diagonal(-lag, 1, 2).sum(-1) for lag in range(tokens)], 1)
    torch.testing.assert_close(along_diagonals(lower), wanted)
