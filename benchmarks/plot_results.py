"""Damage against the cache that is kept, ours and what is published, drawn from docs/results.

python benchmarks/plot_results.py smollm2-135m docs/smollm2.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from results import RESULTS

from kvfold.evaluation import labels, plots
from kvfold.surgery.names import PUBLISHED

PAPERS = {"rorope": "TransMLA", "whitened": "CARE", "svd-joint": "MHA2MLA", "partial-rope-2norm": "MHA2MLA"}
TARGETS = {"gqa": "GQA", "mqa": "MQA", "mla": "MLA", "mfa": "MFA", "mfa-kr": "MFA-KR"}


def best(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the same name, cache and stage the one of least damage."""
    found: dict[tuple[str, float, str], dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: -r["damage_nats"]):
        found[name(result), result["kv_budget"], result["stage"]] = result
    return list(found.values())


def name(result: dict[str, Any]) -> str:
    """What a reader calls it."""
    if result["method"] in PUBLISHED:
        return PAPERS.get(result["method"], result["method"])
    target = result["target"]
    layout = " deepseek_v3" if target["layout"] == "deepseek_v3" else ""
    rebuilt = ", keys rebuilt" if target["to"] == "mla" and not layout and target["rope_dim"] == 0 else ""
    return TARGETS[target["to"]] + layout + rebuilt


def draw(model: str, results: list[dict[str, Any]]) -> Figure:
    """Marks with 95% intervals: hollow in closed form, filled when healed; grey what is published."""
    with plots.themed("light"):
        figure = Figure(figsize=(7.2, 4.4))
        axes = figure.add_subplot()
        marks, named = [], []
        for r in best(results):
            x, y = 100 * r["kv_budget"], r["damage_nats"]
            color = plots.COLORS["" if r["method"] in PUBLISHED else r["target"]["to"]]
            filled = color if r["stage"] != "closed form" else "white"
            axes.errorbar(
                x,
                y,
                [[abs(y - end)] for end in r["damage_interval"]],
                color=color,
                marker="o",
                mfc=filled,
                ms=6,
                lw=1,
                zorder=2,
            )
            marks.append((x, y))
            named.append(((x, y), name(r)))
        axes.set_xscale("log", base=2)
        kept = sorted({round(100 * r["kv_budget"], 1) for r in results})
        axes.set_xlim(0.85 * kept[0], 1.5 * kept[-1])
        axes.set_xticks(kept, [f"{share:g}%" for share in kept])
        axes.xaxis.set_minor_locator(NullLocator())
        plots.log_scale(axes, [r["damage_nats"] for r in results])
        axes.set_xlabel("cache kept")
        axes.set_ylabel("damage, nats per token")
        axes.set_title(f"{model}: damage against cache")
        keys = [
            Line2D([], [], color="black", marker="o", mfc=fill, ls="", label=label)
            for fill, label in (("white", "closed form"), ("black", "healed"))
        ]
        keys.append(Line2D([], [], color=plots.COLORS[""], lw=4, label="published"))
        figure.legend(keys, [str(key.get_label()) for key in keys], loc="outside lower center", ncols=3)
        labels.place(figure, axes, named, marks)
    return figure


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    held = json.loads((RESULTS / f"{model}.json").read_text())
    figure = draw(model, [r for key, r in held.items() if key != "source" and r["stage"] != "uptrained"])
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kvfold"}):
        figure.savefig(out, facecolor="white", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
