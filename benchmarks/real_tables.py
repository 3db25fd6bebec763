"""The tables and the plot of real_models.py."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from kvfold.evaluation import plots
from kvfold.evaluation.damage import position_edges
from kvfold.surgery.names import PUBLISHED

Result = dict[str, Any]
NAMES = {
    "svd-split": "`svd-split` (MHA2MLA)",
    "svd-joint": "`svd-joint` (MHA2MLA)",
    "partial-rope-high": "`partial-rope-high` (MHA2MLA)",
    "partial-rope-low": "`partial-rope-low` (MHA2MLA)",
    "partial-rope-uniform": "`partial-rope-uniform` (MHA2MLA)",
    "partial-rope-2norm": "`partial-rope-2norm` (MHA2MLA)",
    "rorope": "`rorope` (TransMLA)",
    "whitened": "`whitened` (CARE, keys rebuilt)",
    "stock": "MLA, `deepseek_v3`",
    "own": "MLA, own layout",
    "budgets": "MLA, own layout, `--layer-budgets measured`",
    "rebuilt": "MLA, `--keys rebuilt`",
    "gqa": "GQA, MQA",
    "mfa": "MFA",
    "mfa-kr": "MFA-KR",
}
LINES = {"closed": ":", "healed": "-", "uptrained": "--"}


def tables(source: Result, found: list[Result], totals: list[int], about: str) -> str:
    """All tables of a model in Markdown: damage at a glance, every result in full, damage by position."""
    tokens = sorted({r["made"]["calibration_tokens"] for r in found if "calibration_tokens" in r.get("made", {})})
    text = [
        f"## {source['model']}",
        f"{about}. {source['tokens']:,} evaluation tokens, {' or '.join(f'{n:,}' for n in tokens)} calibration "
        f"tokens, kvfold {', '.join(sorted({r['version'] for r in found}))}. Source NLL {source['nll']:.3f}.",
        "Damage in nats per token, closed form → healed → uptrained; in brackets latent + rotary key, or the cache where it is "
        "not all of the column's.",
        overview(source, found, totals),
        "Every result, with 95% bootstrap intervals over windows; seconds and peak memory are those of the stage alone.",
        in_full(found),
        "Damage by tokens of context.",
        by_position(found, position_edges(source["window"] - 1)),
    ]
    return "\n\n".join(text)


def overview(source: Result, found: list[Result], totals: list[int]) -> str:
    whole = source["cache_numbers_per_token_per_layer"]
    lines = [["cache kept", *(f"{total} ({100 * total / whole:.3g}%)" for total in totals)]]
    for row, name in NAMES.items():
        cells = [cell([r for r in found if r["row"] == row and r["total"] == total]) for total in totals]
        if any(cells):
            lines.append([name, *cells])
    return markdown(lines)


def cell(stages: list[Result]) -> str:
    """The stages of one row at one budget; a stage that failed or gained nothing is a dash."""
    if not stages:
        return ""
    text = " → ".join(f"{r['damage_nats']:.3f}" if "damage_nats" in r else "–" for r in stages)
    target, cache = stages[0]["conversion"]["target"], stages[0]["cache_numbers_per_token_per_layer"]
    if (stages[0]["row"] == "stock" or "kv_rank" in stages[0]["form"]) and target["rope_dim"]:
        return f"{text} ({target['kv_rank']} + {target['rope_dim']})"
    return text if abs(cache - stages[0]["total"]) < 4 else f"{text} ({cache:.0f})"


def in_full(found: list[Result]) -> str:
    header = ["", "stage", "cache", "NLL", "damage", "KL", "top-1", "greedy tokens", "needles", "seconds", "peak GiB"]
    lines = [header]
    for r in found:
        if "damage_nats" not in r:
            lines.append([NAMES[r["row"]], r["stage"], str(r["total"]), r["error"], *[""] * (len(header) - 4)])
            continue
        lines.append(
            [
                NAMES[r["row"]],
                r["stage"],
                f"{r['cache_numbers_per_token_per_layer']:.0f}",
                f"{r['nll']:.3f}",
                within(r, "damage_nats", "damage_interval", "+.3f"),
                within(r, "kl", "kl_interval", ".3f"),
                f"{r['top1_agreement']:.1%}",
                f"{r['greedy']['text']['mean']:.1f}" if r["greedy"] else "",
                recall(r),
                f"{r['made']['seconds']:,.0f}",
                f"{(r['made']['peak_memory_bytes'] or 0) / 2**30:.2f}",
            ]
        )
    return markdown(lines)


def within(result: Result, key: str, interval: str, form: str) -> str:
    ends = result[interval]
    return format(result[key], form) + (f" ({' … '.join(format(end, form) for end in ends)})" if ends else "")


def recall(result: Result) -> str:
    """The mean over lengths and depths."""
    if not result["needles"]:
        return ""
    cells = result["needles"]["cells"]
    return f"{sum(c['recall'] for c in cells) / len(cells):.0%}"


def by_position(found: list[Result], edges: list[int]) -> str:
    measured = [r for r in found if "damage_nats" in r]
    lines = [["", "stage", "cache", *(f"{a + 1}–{b}" for a, b in pairwise(edges))]]
    for r in measured:
        values = [f"{value:+.3f}" for value in r["damage_by_position"]]
        lines.append([NAMES[r["row"]], r["stage"], f"{r['cache_numbers_per_token_per_layer']:.0f}", *values])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    rule = "|---|" + "---:|" * (len(lines[0]) - 1)
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], rule, *text[1:]])


def plot(source: Result, found: list[Result], file: Path) -> None:
    """Damage against the share of the cache that is kept: a colour for each row, pale what was published.

    Lines are dotted in closed form, whole when healed, dashed when uptrained.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    whole = source["cache_numbers_per_token_per_layer"]
    measured = [r for r in found if "damage_nats" in r]
    rows = [row for row in NAMES if any(r["row"] == row for r in measured)]
    published, strong, pale = ([row for row in rows if row in PUBLISHED], *(mpl.color_sequences["tab20"][i::2] for i in (0, 1)))
    colors = dict(zip([row for row in rows if row not in PUBLISHED], strong, strict=False))
    colors |= dict(zip(published, pale, strict=False))
    with plots.themed("light"):
        figure = Figure(figsize=(7.2, 6.4))
        axes = figure.add_subplot()
        for row in rows:
            for stage, style in LINES.items():
                points = sorted(
                    (100 * r["cache_numbers_per_token_per_layer"] / whole, r["damage_nats"])
                    for r in measured
                    if r["row"] == row and r["stage"] == stage
                )
                axes.plot(*zip(*points, strict=True), ls=style, marker=".", color=colors[row]) if points else None
        plots.log_scale(axes, [r["damage_nats"] for r in measured])
        axes.set_xscale("log", base=2)
        kept = sorted({round(100 * r["total"] / whole, 1) for r in measured})
        axes.set_xticks(kept, [f"{share:g}" for share in kept])
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.set_xlabel("cache kept, %")
        axes.set_ylabel("damage, nats per token")
        axes.set_title(f"{source['model']}: damage against cache")
        stages = [stage for stage in LINES if any(r["stage"] == stage for r in measured)]
        keys = [Line2D([], [], color=colors[row], lw=3, label=NAMES[row].replace("`", "")) for row in rows]
        keys += [Line2D([], [], color="black", ls=LINES[stage], label=stage) for stage in stages]
        figure.legend(keys, [str(key.get_label()) for key in keys], loc="outside lower center", ncols=2)
        figure.savefig(file, dpi=160, facecolor="white", metadata={"Software": None})
