"""The published ways to MLA: each has its paper's property. Helpers and source layers are those of the other surgery tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold.convert.layouts import modeling_kvfold  # noqa: F401 — registers our layout with transformers
from kvfold.evaluation.layers import measure_cache
from kvfold.surgery import grouping
from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.baselines import METHODS, foldings, turned, weight_norms
from kvfold.surgery.designs import LatentWeights, RebuiltKeyWeights, design
from kvfold.surgery.kvfold_attention import Rope
from kvfold.surgery.lowrank import power_and_inverse
from kvfold.surgery.names import GROUPING, PUBLISHED, REBUILT, rotary_width
from kvfold.surgery.rope import to_complex
from tests.helpers import save_model, save_tokens
from tests.test_convert import IDS, decoded_as_uncached, fold, load, logits
from tests.test_surgery import HEADS, HIDDEN, KV_HEADS, TOKENS, WIDTH, inputs, moment_of, outputs, random_weights, rope_tables

KEYS = KV_HEADS * WIDTH
STILL = torch.ones(TOKENS, WIDTH, dtype=torch.float64), torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
MHA2MLA = [name for name in METHODS if name.startswith(("svd", "partial"))]


def test_plans_know_every_method_by_name() -> None:
    """Without the mathematics, which needs torch."""
    assert (tuple(METHODS), tuple(grouping.METHODS)) == (PUBLISHED, GROUPING)


def folds(method: str, weights: AttentionWeights, rank: int, rope_dim: int, x: Tensor) -> list[Any]:
    return [folded for _, folded in METHODS[method](weights, rank, rope_dim, moment_of(x), x)]


def run(weights: LatentWeights | RebuiltKeyWeights, x: Tensor, rope: Rope | None = None) -> Tensor:
    with torch.no_grad():
        return design(weights)(x, rope or rope_tables())[0]


def of_head(per_query_head: Tensor) -> Tensor:
    """What all query heads of a key head share: (H, D, r) → (G·D, r)."""
    return per_query_head[:: HEADS // KV_HEADS].flatten(0, 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_full_width_is_exact(method: str, bias: bool) -> None:
    """All numbers of all keys turn and the latent holds all values, biases and all; or it holds everything."""
    weights, x = random_weights(bias=bias), inputs()
    rank, rope_dim = (2 * KEYS, 0) if method in REBUILT else (KEYS, KEYS)
    exact = folds(method, weights, rank, rope_dim, x)[0]
    torch.testing.assert_close(run(exact, x), outputs(weights, x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", [*MHA2MLA, "rorope"])
def test_only_lost_rotation_is_lost_at_full_rank(method: str, bias: bool) -> None:
    weights, x = random_weights(bias=bias), inputs()
    still = folds(method, weights, 2 * KEYS - 8, 8, x)
    for folded in still:
        torch.testing.assert_close(run(folded, x, STILL), outputs_without_rotation(weights, x), atol=1e-6, rtol=0)
        assert (run(folded, x) - outputs(weights, x)).abs().max() > 1e-2


def outputs_without_rotation(weights: AttentionWeights, x: Tensor) -> Tensor:
    with torch.no_grad():
        return design(weights)(x, STILL)[0]


@pytest.mark.parametrize(
    ("method", "pairs"),
    [("partial-rope-high", [0, 1]), ("partial-rope-low", [2, 3]), ("partial-rope-uniform", [0, 2])],
)
def test_rules_that_choose_the_same_pairs_in_every_head(method: str, pairs: list[int]) -> None:
    weights, x = random_weights(), inputs()
    folded = folds(method, weights, 10, 4 * KV_HEADS, x)[0]
    assert folded.pairs.tolist() == pairs * KV_HEADS
    keys = to_complex(folded.k_rope)  # a slot for each key head and pair, the source's own keys
    torch.testing.assert_close(keys, to_complex(weights.k)[:, pairs].flatten(0, 1))
    read = folded.q_rope.unflatten(1, (2, KV_HEADS, len(pairs))).abs().amax((1, 3, 4))  # (H, G)
    own = torch.arange(HEADS)[:, None] // (HEADS // KV_HEADS) == torch.arange(KV_HEADS)
    assert torch.equal(read > 0, own), "a query head reads the slots of its own key head only"
    free = of_head(folded.up_k).unflatten(0, (KV_HEADS, 2, -1))
    assert float(free[:, :, pairs].abs().max()) < 1e-12 < float(free.abs().max()), "what turns is not in the latent"


def test_2norm_takes_the_largest_mean_norms_of_each_head() -> None:
    weights, x = random_weights(), inputs()
    pairs = folds("partial-rope-2norm", weights, 10, 4 * KV_HEADS, x)[0].pairs.view(KV_HEADS, 2)
    flat, per = x.flatten(0, 1), HEADS // KV_HEADS
    for g in range(KV_HEADS):
        scores = []
        for i in range(WIDTH // 2):
            both = [i, i + WIDTH // 2]
            query = sum((flat @ weights.q[h, both].T).norm(dim=1).mean() for h in range(g * per, (g + 1) * per))
            scores.append(float(query * (flat @ weights.k[g, both].T).norm(dim=1).mean()))
        assert pairs[g].tolist() == sorted(sorted(range(WIDTH // 2), key=scores.__getitem__)[2:])
    assert len({tuple(row) for row in pairs.tolist()}) > 1, "heads choose for themselves"


def kept_apart(weights: AttentionWeights, folded: LatentWeights) -> Tensor:
    """The position-free keys: the source's with the pairs that turn set to zero."""
    free = weights.k.clone().unflatten(1, (2, -1))
    for g, row in enumerate(folded.pairs.view(KV_HEADS, -1)):
        free[g, :, row] = 0
    return free.flatten(0, 2)


@pytest.mark.parametrize("method", ["svd-joint", "partial-rope-2norm"])
def test_joint_svd_is_the_truncated_svd(method: str) -> None:
    weights, x = random_weights(), inputs()
    folded = folds(method, weights, 10, 2 * KV_HEADS, x)[0]
    stacked = torch.cat([kept_apart(weights, folded), weights.v.flatten(0, 1)])
    u, s, vh = torch.linalg.svd(stacked, full_matrices=False)
    got = torch.cat([of_head(folded.up_k), of_head(folded.up_v)]) @ folded.down
    torch.testing.assert_close(got, u[:, :10] * s[:10] @ vh[:10], atol=1e-9, rtol=0)


def test_split_svd_is_two_truncated_svds() -> None:
    weights, x = random_weights(), inputs()
    folded = folds("svd-split", weights, 10, 2 * KV_HEADS, x)[0]
    for up, rows in ((folded.up_k, kept_apart(weights, folded)), (folded.up_v, weights.v.flatten(0, 1))):
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        torch.testing.assert_close(of_head(up) @ folded.down, u[:, :5] * s[:5] @ vh[:5], atol=1e-9, rtol=0)


def test_the_weights_only_methods_look_at_no_data() -> None:
    weights = random_weights()
    for method in ("svd-split", "svd-joint"):
        one, other = (folds(method, weights, 10, 2 * KV_HEADS, inputs(seed))[0] for seed in (1, 2))
        assert torch.equal(one.pairs, other.pairs)
        torch.testing.assert_close(one.up_v @ one.down, other.up_v @ other.down)
    white = torch.randn(100_000, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = [0, WIDTH // 2]
    mean_square = [float((white @ w[0, first].T).square().sum(1).mean()) for w in (weights.k, weights.q, weights.q[1:])]
    wanted = mean_square[0] ** 0.5 * (mean_square[1] ** 0.5 + mean_square[2] ** 0.5)
    assert float(weight_norms(weights)[0, 0]) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_rorope_turns_by_an_orthogonal_basis_of_largest_variance(fold: int) -> None:
    """A group's first component holds the most energy that one real combination, the same in both halves, can."""
    weights, x = random_weights(), inputs()
    rotary = turned(weights, WIDTH, moment_of(x), fold)
    torch.testing.assert_close(rotary.basis @ rotary.basis.T, torch.eye(KEYS, dtype=torch.float64))
    assert rotary.pairs.tolist() == list(range(WIDTH // 2))
    keys = (x.flatten(0, 1) @ weights.k.flatten(0, 1).T).unflatten(1, (KV_HEADS, 2, -1, fold))  # (T, G, 2, groups, fold)
    for group in range(WIDTH // 2 // fold):
        samples = keys[:, :, :, group].transpose(1, 2).flatten(0, 1).flatten(1)  # (T·2, G·fold)
        variance = torch.linalg.svdvals(samples).square()
        rows = [group * fold + half * WIDTH // 2 for half in (0, 1)]
        kept = sum((x @ weights.k.flatten(0, 1).T @ rotary.basis[row]).square().sum() for row in rows)
        assert float(kept) == pytest.approx(float(variance[0]), rel=1e-9)


def test_rorope_without_folding_commutes_with_rotation() -> None:
    """As above at full width, where fold 1 is exact; folding treats two frequencies as one and is not."""
    weights, x = random_weights(), inputs()
    errors = [float((run(f, x) - outputs(weights, x)).abs().max()) for f in folds("rorope", weights, KEYS, KEYS, x)]
    assert len(errors) == 3
    assert errors[0] < 1e-6 < 1e-2 < errors[1]


def test_rorope_skips_frequencies_where_fewer_turn() -> None:
    """The authors' `collapse`: D/R neighbouring frequencies give one, which is the first of them."""
    weights, x = random_weights(), inputs()
    assert foldings(WIDTH, WIDTH) == [1, 2, 4]
    assert foldings(WIDTH, 4) == [2, 4]
    assert foldings(WIDTH, 2 * WIDTH) == [1, 2, 4]
    assert turned(weights, 4, moment_of(x), 2).pairs.tolist() == [0, 2]
    assert turned(weights, 2 * WIDTH, moment_of(x), 2).pairs.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_balanced_pca_is_the_pca_of_outputs() -> None:
    weights, x = random_weights(bias=True), inputs()
    rank, moment = 10, moment_of(x)
    folded = folds("rorope", weights, rank, WIDTH, x)[0]
    rotary = turned(weights, WIDTH, moment, 1)
    flat = x.flatten(0, 1)
    keys = (flat @ weights.k.flatten(0, 1).T + weights.k_bias.flatten()) @ rotary.basis[WIDTH:].T
    values = flat @ weights.v.flatten(0, 1).T + weights.v_bias.flatten()
    ratio = keys.norm(dim=0).mean() / values.norm(dim=0).mean()
    outputs = torch.cat([keys / ratio, values], 1)
    left = torch.linalg.svdvals(outputs)[rank:].square().sum()
    latent = flat @ folded.down.T + folded.kv_bias[:rank]
    lost_k = keys - latent @ of_head(folded.up_k).T @ rotary.basis[WIDTH:].T
    lost_v = values - latent @ of_head(folded.up_v).T
    assert float((lost_k / ratio).square().sum() + lost_v.square().sum()) == pytest.approx(float(left), rel=1e-6)


def test_whitened_is_optimal_in_the_metric_of_the_inputs() -> None:
    """`W' = C^-½ · SVD_r(C^½ Wᵀ)`: no other map of that rank loses less of the keys, or of the values, on these inputs."""
    weights, x = random_weights(), inputs()
    folded = folds("whitened", weights, 12, 0, x)[0]
    c = x.flatten(0, 1).T @ x.flatten(0, 1) / (x.shape[0] * TOKENS)
    c = c + 0.01 * c.diagonal().mean() * torch.eye(HIDDEN, dtype=torch.float64)
    root, inverse = power_and_inverse(c, 0.5, 1e-12)
    for up, w in ((folded.up_k, weights.k), (folded.up_v, weights.v)):
        u, s, vh = torch.linalg.svd(root @ w.flatten(0, 1).T, full_matrices=False)
        wanted = (inverse @ (u[:, :6] * s[:6]) @ vh[:6]).T
        torch.testing.assert_close(up.flatten(0, 1) @ folded.down, wanted, atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("method", "wanted", "width"),
    [
        ("svd-joint", 30, 24),
        ("svd-joint", 4, 8),
        ("partial-rope-2norm", 32, 32),
        ("rorope", 30, 24),
        ("rorope", 7, 4),
        ("rorope", 2, 2),
    ],
)
def test_rotary_widths_that_a_method_can_have(method: str, wanted: int, width: int) -> None:
    assert rotary_width(method, KV_HEADS, WIDTH, wanted) == width


@pytest.mark.parametrize("method", METHODS)
def test_folds_checkpoints_with_biases_healing_and_low_rank_queries(method: str, tmp_path: Path) -> None:
    """The whole way into our own layout, at the cache that was asked for."""
    source = save_model(tmp_path / "source", "qwen2", num_key_value_heads=4)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    shape = {"kv_rank": 26} if method in REBUILT else {"kv_rank": 16, "rope_dim": 10}
    settings = {"to": "mla", "method": method, **shape, "q_rank": 32, "calibrate": tokens}
    fold(source, tmp_path / "out", **settings, heal_steps=2, heal_batch_tokens=80)
    model = load(tmp_path / "out")
    decoded_as_uncached(model)
    widths = [None if method in REBUILT else 8] * 2
    assert [layer.get("rope_dim") for layer in model.config.folded_layers] == widths
    assert measure_cache(model, IDS[:1, :10]) == (26, 26 * 4 * 2)


@pytest.mark.parametrize("method", ["svd-split", "partial-rope-2norm", "rorope"])
def test_checkpoints_of_full_width_are_the_source(method: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen2", num_key_value_heads=4)
    tokens = save_tokens(tmp_path / "t.safetensors", 16, 40)
    fold(source, tmp_path / "out", to="mla", method=method, kv_rank=32, rope_dim=32, calibrate=tokens)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), atol=1e-4, rtol=1e-4)
