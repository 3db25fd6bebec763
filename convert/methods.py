"""What a method offers for one layer, and which of it is best: the bridge from a plan to the mathematics in surgery/."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from kvfold.convert import processes
from kvfold.convert.calibration import Observed
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.planning.widths import widths_to_try
from kvfold.surgery import baselines, factorized, grouping, latent, norms, rebuilt
from kvfold.surgery.attention import AttentionWeights
from kvfold.surgery.constant import without_biases
from kvfold.surgery.designs import FoldedWeights
from kvfold.surgery.latent import Choice, Queried, Tries


def alone(plan: ConversionPlan, weights: AttentionWeights, layer: int) -> tuple[str, AttentionWeights]:
    """Fold a layer from its weights: a label and the result."""
    return next(_grouped(plan, weights, layer, None, None))


def best(plan: ConversionPlan, seen: Observed, layer: int) -> tuple[float, str, FoldedWeights]:
    """What the method offers for this layer that is least wrong: its error by `seen.measure`, a label, and the weights."""
    if plan.design != "grouped":
        return best_latent(plan, seen, *plan.layer_widths(layer))
    moment = seen.attended if plan.method == "pca" else seen.moment
    return _least(seen, _grouped(plan, seen.weights, layer, seen.moment, moment))


def best_latent(
    plan: ConversionPlan, seen: Observed, rank: int, rope_dim: int, search: bool = True
) -> tuple[float, str, FoldedWeights]:
    """The same for the designs whose cache is one latent, at these widths; without `search` only where it would begin."""
    alone = seen.alone()  # each candidate is one process's
    layer, linear = alone.layer, alone.linear

    def thin(folded: Queried) -> Queried:
        if linear is not None:
            return linear.restored(cast(Queried, folded.to(torch.float64)))
        if plan.q_rank is not None:
            return latent.low_rank_queries(cast(Queried, folded.to(torch.float64)), plan.q_rank, seen.moment)
        return folded

    if plan.method in baselines.METHODS:
        offered = baselines.METHODS[plan.method](alone.bare(torch.float64), rank, rope_dim, seen.moment, alone.sample)
        return _least(seen, ((label, thin(folded)) for label, folded in offered))

    def fold(choice: Choice) -> FoldedWeights:
        if plan.design == "rebuilt-key":
            return thin(rebuilt.rebuilt(layer, rank, choice))
        if plan.design == "reused-key":
            return thin(factorized.mfa_kr(layer, rope_dim, choice))
        if plan.settings.to == "mfa":
            return thin(factorized.mfa(layer, rope_dim, choice))
        folded = thin(latent.fold(layer, rank, rope_dim, choice, turned=plan.turned_keys(rank, rope_dim)))
        return without_biases(folded, seen.constant) if plan.settings.biases == "regressed" else folded

    start, tries = _search(plan)
    if plan.design == "latent" and not rope_dim:
        tries = {name: values for name, values in tries.items() if name not in ("picked", "slots")}
    if not search:
        return _measured(alone, [(str(start), fold(start))])
    found = latent.search(fold, alone.compare, start, tries, processes.spread)
    return _measured(seen, [(str(choice), _shared(folded, seen.attended.device)) for _, choice, folded in found])


def _shared(folded: FoldedWeights | None, device: torch.device) -> FoldedWeights:
    """On all processes what one of them has folded."""
    if processes.count() == 1 and folded is not None:
        return folded
    return cast(FoldedWeights, processes.from_one(None if folded is None else folded.to("cpu")).to(device))


def forms_tried(plan: ConversionPlan) -> tuple[int, int]:
    """About how many candidates a layer is folded into, and how many where widths are measured."""
    if plan.design == "grouped":
        return (len(grouping.PCA_POWERS) if plan.method == "pca" else 1), 0
    splits = len(widths_to_try(plan)) if plan.measures_widths else 0
    if plan.method in baselines.METHODS:
        return 1, splits
    return 1 + sum(map(len, _search(plan)[1].values())), splits


def _least(seen: Observed, offered: Iterable[tuple[str, FoldedWeights]]) -> tuple[float, str, FoldedWeights]:
    """Of all that is offered, what is least wrong by `seen.compare`, and of the two best what is by `seen.measure`."""
    entries = ((seen.compare(folded), number, label, folded) for number, (label, folded) in enumerate(offered))
    return _measured(seen, ((label, folded) for *_, label, folded in heapq.nsmallest(2, entries)))


def _measured(seen: Observed, offered: Iterable[tuple[str, FoldedWeights]]) -> tuple[float, str, FoldedWeights]:
    return min(((seen.measure(folded), label, folded) for label, folded in offered), key=lambda entry: entry[0])


def _search(plan: ConversionPlan) -> tuple[Choice, Tries]:
    """Where the search for a layer's best choice begins, and what it tries."""
    if plan.design == "rebuilt-key":
        return rebuilt.START, rebuilt.TRIED
    # What is constant over linear keys is not over normed ones, and does not fall out of the softmax behind a soft cap; beside
    # a sink attention weights do not sum to one.
    sized = plan.spec.key_norm and plan.settings.key_norm == "cached"
    if plan.spec.sinks or ((sized or plan.spec.score_cap) and plan.settings.to != "mfa"):
        started, tries = latent.FREE_START, latent.FREE
        if plan.settings.to != "mla":
            started, tries = factorized.START[plan.settings.to], factorized.TRIED[plan.settings.to]
        return replace(started, centred=False), {name: values for name, values in tries.items() if name != "centred"}
    if plan.layout == "step3_text":
        return factorized.STOCK_START, factorized.STOCK
    if plan.settings.to != "mla":
        return factorized.START[plan.settings.to], factorized.TRIED[plan.settings.to]
    if plan.settings.biases == "regressed":
        return latent.BIASED_START, latent.BIASED
    return (latent.START, latent.STOCK) if plan.layout == "deepseek_v3" else (latent.FREE_START, latent.FREE)


def _grouped(
    plan: ConversionPlan, weights: AttentionWeights, layer: int, alike: Tensor | None, moment: Tensor | None
) -> Iterator[tuple[str, AttentionWeights]]:
    """What the method offers for fewer heads: which of them share one is decided under the moment `alike`."""
    if plan.grouping == "similar":
        groups = grouping.similar(weights, plan.kv_heads, alike)
    else:
        groups = grouping.neighbours(plan.spec.kv_heads, plan.kv_heads)
    generator = torch.Generator().manual_seed(plan.settings.seed * 100_003 + layer)
    offer = norms.merged if plan.spec.key_norm else grouping.candidates
    return offer(plan.method, grouping.permute_heads(weights, groups), plan.kv_heads, moment, generator)
