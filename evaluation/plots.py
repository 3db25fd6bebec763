"""The plots of a report, by matplotlib (extra `plots`): each function takes a report and returns a figure.

Figures are narrow, so that their letters stay readable on a phone. Colour is the target, line and marker are the stage.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kvfold.evaluation import labels

Data = dict[str, Any]
WIDTH = 5.2
"""Inches. At the 11 points of the letters a screen of 360 pixels shows them about 11 pixels high."""
COLORS = {"gqa": "#d1495b", "mqa": "#e08e1b", "mla": "#2f7ed8", "mfa": "#3a9d5d", "mfa-kr": "#8e5fd0", "": "#808080"}
STAGES = {"closed form": ("o", ":"), "healed": ("s", "-"), "uptrained": ("*", "--"), "unknown": ("D", "-.")}
THEMES = {
    "light": {"text": "#1f2328", "grid": "#d5d9de", "front": "#57606a"},
    "dark": {"text": "#e6edf3", "grid": "#3a424c", "front": "#9aa5b1"},
}


@contextmanager
def themed(theme: str) -> Iterator[dict[str, str]]:
    """Letters and lines for a light or a dark page, on a transparent ground."""
    colors = THEMES[theme]
    edges = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), colors["text"])
    style: dict[Any, Any] = {
        **edges,
        "font.size": 11,
        "axes.titlesize": 12,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": colors["grid"],
        "grid.linewidth": 0.6,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "kvfold",
        "text.parse_math": False,  # a name with a dollar in it is no formula
    }
    with mpl.rc_context(style):
        yield colors


def name_of(model: Data) -> str:
    return Path(model["path"]).name


def target_of(model: Data) -> str:
    return model["conversion"]["target"]["to"] if model["conversion"] else ""


def color_of(model: Data) -> str:
    return COLORS.get(target_of(model), COLORS[""])


def best_of_each(report: Data) -> list[Data]:
    """Of the models with the same target and cache the one of least damage: what crowded plots show."""
    best: dict[tuple[str, float], Data] = {}
    for model in report["models"]:
        key = target_of(model), model["cache_bytes_per_token"]
        if key not in best or model["damage_nats"] < best[key]["damage_nats"]:
            best[key] = model
    return list(best.values())


def pareto_front(report: Data) -> list[Data]:
    """Models that no other one beats in both cache and damage, by cache."""
    front: list[Data] = []
    for model in sorted(report["models"], key=lambda m: (m["cache_bytes_per_token"], m["damage_nats"])):
        if not front or model["damage_nats"] < front[-1]["damage_nats"]:
            front.append(model)
    return front


def damage(report: Data, colors: dict[str, str]) -> Figure:
    """Damage against cache bytes, with the Pareto front."""
    figure = Figure(figsize=(WIDTH, 4.4))
    axes = figure.add_subplot()
    front = pareto_front(report)
    axes.plot(*_points(front), color=colors["front"], lw=1, drawstyle="steps-post", zorder=1)
    for model in report["models"]:
        x, y = model["cache_bytes_per_token"], model["damage_nats"]
        if model["damage_interval"]:
            axes.vlines(x, *model["damage_interval"], color=color_of(model), lw=1, alpha=0.6)
        marker = STAGES[model["stage"]][0]
        axes.scatter(x, y, 90 if marker == "*" else 42, color=color_of(model), marker=marker, alpha=0.9, zorder=2)
    source = report["source"]["cache_bytes_per_token"]
    axes.axvline(source, color=colors["front"], lw=0.8, ls=":")
    axes.text(source, 1.0, "source ", transform=axes.get_xaxis_transform(), ha="right", va="top", fontsize=9)
    _log2(axes, [m["cache_bytes_per_token"] for m in [*report["models"], report["source"]]])
    log_scale(axes, [value for m in report["models"] for value in (m["damage_nats"], *(m["damage_interval"] or ()))])
    axes.set_xlabel("KV cache, bytes per token")
    axes.set_ylabel("damage, nats per token")
    axes.set_title("Damage against cache size")
    targets = list(dict.fromkeys(map(target_of, report["models"])))
    stages = [stage for stage in STAGES if any(m["stage"] == stage for m in report["models"])]
    keys = [Line2D([], [], color=COLORS.get(t, COLORS[""]), lw=4, label=t or "other") for t in targets]
    keys += [Line2D([], [], color=colors["text"], marker=STAGES[s][0], ls="", label=s) for s in stages]
    keys += [Line2D([], [], color=colors["front"], lw=1, label="Pareto front")]
    _legend(figure, keys)
    named = [((m["cache_bytes_per_token"], m["damage_nats"]), name_of(m)) for m in front]
    bars = [(m["cache_bytes_per_token"], end) for m in report["models"] for end in m["damage_interval"] or ()]
    labels.place(figure, axes, named, [*zip(*_points(report["models"]), strict=True), *bars])
    return figure


def positions(report: Data, colors: dict[str, str]) -> Figure:
    """Damage over the position in the window."""
    figure, axes = _curves(report, "damage_by_position", [(a + b) / 2 for a, b in pairwise(report["position_edges"])])
    axes.set_xlabel("tokens of context before the predicted token")
    axes.set_ylabel("damage, nats per token")
    axes.set_title("Damage by position in the context")
    return figure


def layers(report: Data, colors: dict[str, str]) -> Figure:
    """Relative error of every layer's attention output."""
    figure, axes = _curves(report, "attention_errors", range(len(report["models"][0]["attention_errors"])))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer, counted from 0")
    axes.set_ylabel("squared error / squared norm, ratio")
    axes.set_title("Error of each layer's attention output")
    return figure


def _curves(report: Data, key: str, places: Sequence[float]) -> tuple[Figure, Axes]:
    """One line for each model that is shown, on a logarithmic axis."""
    figure = Figure(figsize=(WIDTH, 4.4))
    axes = figure.add_subplot()
    shown = best_of_each(report)
    for model in shown:
        axes.plot(places, model[key], marker=".", label=name_of(model), **_line(model))
    log_scale(axes, [value for model in shown for value in model[key]])
    _legend(figure, *axes.get_legend_handles_labels())
    return figure, axes


def greedy(report: Data, colors: dict[str, str]) -> Figure:
    """Share of greedy answers that are still the source's, over their tokens; one panel for text and for chat."""
    own = report["source"]["greedy"]
    kinds = [kind for kind in ("text", "chat") if own[kind]]
    figure = Figure(figsize=(WIDTH, 1.6 + 2.6 * len(kinds)))
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    shown = [(report["source"], f"source, {own['dtype']}", {"color": colors["text"], "ls": "-"})]
    shown += [(m, name_of(m), _line(m)) for m in best_of_each(report)]
    for axes, kind in zip(panels, kinds, strict=True):
        for model, name, style in shown:
            shares = [1.0, *model["greedy"][kind]["still"]]
            axes.plot(range(len(shares)), [100 * share for share in shares], label=name, **style)
        axes.set_ylim(0, 103)
        axes.set_ylabel("still the source's, %")
        axes.set_title({"text": "Greedy answers", "chat": "Greedy answers, chat template"}[kind])
    panels[-1].set_xlabel("tokens of the answer")
    _legend(figure, *panels[0].get_legend_handles_labels())
    return figure


def speed(report: Data, colors: dict[str, str]) -> Figure:
    """Decoded tokens per second against the context, one panel per batch."""
    batches = sorted({row["batch"] for row in report["source"]["speed"]})
    figure = Figure(figsize=(WIDTH, 1.6 + 2.6 * len(batches)))
    panels = figure.subplots(len(batches), 1, squeeze=False)[:, 0]
    shown = [(report["source"], "source", {"color": colors["text"], "ls": "-"})]
    shown += [(m, name_of(m), _line(m)) for m in best_of_each(report)]
    for axes, batch in zip(panels, batches, strict=True):
        for model, name, style in shown:
            rows = [r for r in model["speed"] if r["batch"] == batch and r["tokens_per_second"] is not None]
            axes.plot([r["context"] for r in rows], [r["tokens_per_second"] for r in rows], marker=".", label=name, **style)
        _log2(axes, [r["context"] for r in report["source"]["speed"]])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        axes.set_title(f"Decoding speed, batch {batch}, {report['device']}")
    panels[-1].set_xlabel("context, tokens in the cache")
    _legend(figure, *panels[0].get_legend_handles_labels())
    return figure


def needles(report: Data, colors: dict[str, str]) -> Figure:
    """Recall over depth and length, one panel per model."""
    shown = [(report["source"], "source"), *((m, name_of(m)) for m in best_of_each(report))]
    columns = 2
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * rows))
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes, (model, name) in zip(panels.flat, shown, strict=False):
        cells = model["needles"]["cells"]
        depths, lengths = (sorted({cell[key] for cell in cells}) for key in ("depth", "length"))
        recall = {(cell["depth"], cell["length"]): cell["recall"] for cell in cells}
        grid = [[100 * recall[d, n] for n in lengths] for d in depths]
        image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="black" if value > 60 else "white")
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=8)
        axes.set_title(name, fontsize=10)
        axes.grid(False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    figure.suptitle("Needle found: recalled tokens, %", fontsize=12)
    figure.supxlabel("context, tokens", fontsize=10)
    figure.supylabel("depth of the needle", fontsize=10)
    assert image is not None
    return figure


FIGURES: dict[str, tuple[Callable[[Data, dict[str, str]], Figure], str]] = {
    "damage": (
        damage,
        "Damage is the NLL above the source's on the same tokens; bars are 95% bootstrap intervals over windows. "
        "Lower left is better.",
    ),
    "positions": (
        positions,
        "Mean damage of the predictions that have that much context. Attention that forgets shows on the right.",
    ),
    "greedy": (
        greedy,
        "How many answers have not left the source's after so many tokens, an ended answer counting as one that has not; the "
        "source in another dtype is what rounding alone does.",
    ),
    "layers": (
        layers,
        "Energy of what each attention block gets wrong, over the energy of its output, on the source's own inputs.",
    ),
    "speed": (speed, "Greedy decoding by transformers, from the median step; other engines differ."),
    "needles": (
        needles,
        "A passage stands at some depth of the context and is begun again at its end: how much of the rest the model then "
        "predicts, and how much it would have guessed, is in the table.",
    ),
}
"""Name, function, and what a reader must know to read it, in the order of the page."""


def figures(report: Data, colors: dict[str, str]) -> dict[str, Figure]:
    """All figures that the report has numbers for. Of one model there is no damage to compare."""
    alone = len(report["models"]) == 1
    wanted = [name for name in FIGURES if report["source"].get(name, True) and not (name == "damage" and alone)]
    return {name: FIGURES[name][0](report, colors) for name in wanted}


def _points(models: list[Data]) -> tuple[list[float], list[float]]:
    return [m["cache_bytes_per_token"] for m in models], [m["damage_nats"] for m in models]


def _line(model: Data) -> dict[str, Any]:
    """Colour by target; of one target the smaller cache is fainter."""
    share = model["conversion"]["kv_budget"] if model["conversion"] else 1.0
    return {"color": color_of(model), "ls": STAGES[model["stage"]][1], "alpha": min(1.0, 0.5 + share), "lw": 1.6}


def log_scale(axes: Axes, values: list[float]) -> None:
    """Logarithmic upwards, with 0.1 in place of 10⁻¹; about zero linear, where some model is not worse than the source."""
    low, high = min(values), max(map(abs, values))
    linear = 0.0 if low > 0 else max(1e-6, high / 300, min(high, -2 * low))
    if linear:
        axes.set_yscale("symlog", linthresh=linear)
        axes.set_ylim(min(1.5 * low, -linear / 4), 1.6 * high)
    else:
        axes.set_yscale("log")
    # what a short axis has between two powers is named too
    few = not linear and high / low < 30
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if not value or abs(value) >= linear / 2 else "")
    )
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if few and f"{value:e}"[0] in "235" else ""))


def _log2(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis whose ticks are the values themselves."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(values))
    axes.set_xticks(ticks, [f"{value:,.0f}" for value in ticks])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def _legend(figure: Figure, handles: list[Any], names: list[str] | None = None) -> None:
    figure.legend(handles, names or [str(handle.get_label()) for handle in handles], loc="outside lower center", ncols=3)
