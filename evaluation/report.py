"""The report of an evaluation: report.json, report.md, report.html with its plots, and the table on the terminal."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.convert.output.files import write_whole
from kvfold.convert.publishing import escape
from kvfold.errors import UserError
from kvfold.evaluation.schema import Report, read_report
from kvfold.evaluation.unfinished import PARTIAL

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
PLOTS = "plots"
"""Folder of the PNGs, beside the report."""
Column = tuple[str, Callable[[dict[str, Any], dict[str, Any]], str]]


def _number(key: str, form: str) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    return lambda row, source: "–" if row.get(key) is None else format(row[key], form)


COLUMNS: list[Column] = [  # what matters first: a phone shows five
    ("model", lambda row, source: row.get("name") or Path(row["path"]).name),
    ("damage", _number("damage_nats", "+.4f")),
    (
        "kept",
        lambda row, source: format(
            row["cache_numbers_per_token_per_layer"] / source["cache_numbers_per_token_per_layer"], ".1%"
        ),
    ),
    ("KL", _number("kl", ".4f")),
    ("top-1", _number("top1_agreement", ".1%")),
    ("NLL", _number("nll", ".4f")),
    ("cache", _number("cache_numbers_per_token_per_layer", ".0f")),
    ("bytes", _number("cache_bytes_per_token", ",.0f")),
    ("bits/B", _number("bits_per_byte", ".3f")),
]
LEGEND = (
    "Damage is the NLL above the source's on the same tokens, KL is from the source; both, and NLL, in nats per token. "
    "Kept is the share of the source's cache, top-1 how often both models' most likely token is the same. "
    "Cache is cached numbers per token per layer, bytes what the whole cache takes per token, both counted in a generation; "
    "bits/B is bits per byte of text."
)


def rows(result: Row) -> list[list[str]]:
    """The table's cells, source first."""
    source = {**result["source"], "name": "source"}
    return [[cell(row, source) for _, cell in COLUMNS] for row in [source, *result["models"]]]


def table(result: dict[str, Any], title: str = "") -> "Table":
    from rich.table import Table
    from rich.text import Text

    out = Table(title=title or None, caption=LEGEND)
    for number, (name, _) in enumerate(COLUMNS):
        out.add_column(name, justify="right" if number else "left", no_wrap=True)
    for cells in rows(result):
        out.add_row(*map(Text, cells))  # a name is no markup
    return out


def markdown(result: dict[str, Any]) -> str:
    """The table in Markdown, source first."""
    return _markdown([name for name, _ in COLUMNS], rows(result))


def details(result: Row) -> list[Row]:
    """The other tables, `{"title", "note", "header", "rows"}` with all cells text; those without numbers are left out."""
    tables = [
        _intervals(result),
        _tasks(result),
        _greedy(result),
        _needles(result),
        _speed(result),
        _positions(result),
        _layers(result),
    ]
    return [made for made in tables if made["rows"]]


def write(result: Row, folder: Path) -> list[Path]:
    """Write report.json, report.md, report.html and the plots into `folder`; return the paths of the first three.

    Without matplotlib there is no page and there are no plots.
    """
    Report.model_validate(result)
    folder.mkdir(parents=True, exist_ok=True)
    settings, drawn = result["settings"], find_spec("matplotlib") is not None
    paths = [folder / "report.json", folder / "report.md"]
    write_whole(paths[0], json.dumps(result, indent=2) + "\n")
    main = {"title": "Damage", "note": "", "header": [name for name, _ in COLUMNS], "rows": rows(result)}
    images = []
    if drawn:
        from kvfold.evaluation import page

        images = page.write_plots(result, folder / PLOTS)
        paths.append(folder / "report.html")
        write_whole(paths[-1], page.page(result, [main, *details(result)], LEGEND))
    text = [
        "# kvfold evaluation",
        f"{result['tokens']:,} predicted tokens of {escape.markdown(settings['on'])}, "
        f"windows of {result['position_edges'][-1] + 1}, {settings['dtype']}, {result['device']}, kvfold {result['version']}.",
        markdown(result) + "\n" + LEGEND,
        *(f"![{image.stem}]({PLOTS}/{image.name})" for image in images),
        *(f"## {t['title']}\n\n{t['note']}\n\n{_markdown(t['header'], t['rows'])}" for t in details(result)),
    ]
    write_whole(paths[1], "\n\n".join(part.strip("\n") for part in text) + "\n")
    (folder / PARTIAL).unlink(missing_ok=True)
    return paths


def for_card(folder: Path, out: Path) -> tuple[Row, Row, str | None]:
    """The report in `folder`, the row of `out` in it, and the path of a plot in `out`, where it is copied to: damage against
    the cache where there is something to compare, else by position.

    Raises:
        UserError: there is no readable report, or `out` is not in it.
    """
    result = read_report(folder)
    whole, name = (escape.visible(text) for text in (out.resolve(), out.resolve().name))
    found = [m for m in result["models"] if str(Path(m["path"]).resolve()) == whole]
    # a report that has moved along with the models still knows them by name
    found = found or [m for m in result["models"] if Path(m["path"]).name == name]
    if len(found) != 1:
        names = ", ".join(m["path"] for m in result["models"])
        raise UserError(f"{folder / 'report.json'} has no results of {out}, only of {names}: measure it with kvfold evaluate")
    plot = folder / PLOTS / ("damage.png" if len(result["models"]) > 1 else "positions.png")
    if not plot.exists():
        return result, found[0], None
    (out / PLOTS).mkdir(exist_ok=True)
    if folder.resolve() != out.resolve():
        shutil.copyfile(plot, out / PLOTS / plot.name)
    return result, found[0], f"{PLOTS}/{plot.name}"


def _markdown(header: list[str], body: list[list[str]]) -> str:
    header, *rows = ([escape.markdown(cell) for cell in cells] for cells in (header, *body))
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


def _named(result: Row) -> list[tuple[str, Row]]:
    return [("source", result["source"]), *((Path(m["path"]).name, m) for m in result["models"])]


def _intervals(result: Row) -> Row:
    def ends(model: Row, key: str, form: str) -> str:
        return "–" if model[key] is None else " … ".join(format(end, form) for end in model[key])

    body = [
        [
            Path(m["path"]).name,
            ends(m, "damage_interval", "+.4f"),
            ends(m, "kl_interval", ".4f"),
            ends(m, "top1_interval", ".1%"),
            m["stage"],
            f"{m['perplexity']:.3f}",
            f"{m['parameters']:,}",
        ]
        for m in result["models"]
    ]
    return {
        "title": "Intervals and parameters",
        "note": "95% bootstrap intervals of the mean over windows; damage and KL in nats per token.",
        "header": ["model", "damage", "KL", "top-1", "stage", "perplexity", "parameters"],
        "rows": body,
    }


def _tasks(result: Row) -> Row:
    columns = sorted(
        {(task, metric) for _, m in _named(result) for task in m["tasks"] for metric in m["tasks"][task]["metrics"]}
    )

    def value(model: Row, task: str, metric: str) -> str:
        found = model["tasks"].get(task, {}).get("metrics", {}).get(metric)
        if found is None:
            return "–"
        return f"{found['value']:.4f}" + ("" if found["stderr"] is None else f" ± {found['stderr']:.4f}")

    return {
        "title": "Tasks",
        "note": "Measured by lm-eval, ± standard error.",
        "header": ["model", *(f"{task} {metric}" for task, metric in columns)],
        "rows": [[name, *(value(m, *column) for column in columns)] for name, m in _named(result)] if columns else [],
    }


def _greedy(result: Row) -> Row:
    shown = [(name, m["greedy"]) for name, m in _named(result) if m["greedy"]]
    if not shown:
        return {"rows": []}
    first, floor = shown[0][1], result["source"]["greedy"]
    kinds = [kind for kind in ("text", "chat") if first[kind]]

    def cells(found: Row) -> list[str]:
        interval = "" if found["mean_interval"] is None else " ({:.1f} … {:.1f})".format(*found["mean_interval"])
        return [f"{found['mean']:.1f}{interval}", f"{found['median']:g}", f"{found['never_leaves']:.0%}"]

    names = {"text": "", "chat": "chat: "}
    asked = " and ".join(f"{first[kind]['prompt_tokens']} tokens of {kind}" for kind in kinds)
    lengths = " and ".join(f"{first[kind]['answer_tokens']:.1f}" for kind in kinds)
    return {
        "title": "Greedy answers",
        "note": f"Tokens until a model's greedy answer is another than the source's, of at most {first['tokens']}: mean with "
        f"its 95% bootstrap interval, median, and the share of answers that are the source's to their end. "
        f"{first['text']['prompts']} prompts of {asked}; the source's answers have {lengths} tokens in the mean."
        + (f" The source itself in {floor['dtype']} is the floor that rounding sets." if floor else ""),
        "header": ["model", *(f"{names[kind]}{name}" for kind in kinds for name in ("tokens", "median", "never leaves"))],
        "rows": [
            [f"source, {found['dtype']}" if found is floor else name, *(c for kind in kinds for c in cells(found[kind]))]
            for name, found in shown
        ],
    }


def _needles(result: Row) -> Row:
    needles = result["source"]["needles"]
    if needles is None:
        return {"rows": []}
    lengths = sorted({cell["length"] for cell in needles["cells"]})

    def cells(model: Row, length: int) -> str:
        found = sorted((c for c in model["needles"]["cells"] if c["length"] == length), key=lambda c: c["depth"])
        return " ".join(f"{c['recall']:.0%}" for c in found) + f" ({found[0]['blind']:.0%})"

    depths = ", ".join(f"{d:.0%}" for d in sorted({cell["depth"] for cell in needles["cells"]}))
    return {
        "title": "Needles",
        "note": f"Of {needles['trials']} passages hidden in the context and begun again at its end with "
        f"{needles['key_tokens']} tokens, how many of the next {needles['value_tokens']} tokens are the model's most likely "
        f"ones: at depths of {depths} of the context; in parentheses what it guesses without the passage.",
        "header": ["model", *(f"{n} tokens" for n in lengths)],
        "rows": [[name, *(cells(m, n) for n in lengths)] for name, m in _named(result)],
    }


def _speed(result: Row) -> Row:
    columns = [(row["context"], row["batch"]) for row in result["source"]["speed"]]

    def cell(row: Row) -> str:
        if row["tokens_per_second"] is None:
            return "out of memory"
        size = row["peak_memory_bytes"] or row["cache_bytes"]
        return f"{row['tokens_per_second']:,.0f} ({size / 2**20:,.1f} MiB)"

    memory = "peak memory" if any(row["peak_memory_bytes"] for row in result["source"]["speed"]) else "the cache"
    return {
        "title": "Decoding",
        "note": f"Tokens per second over the batch, greedy decoding by transformers, and {memory} in parentheses.",
        "header": ["model", *(f"{context:,} × {batch}" for context, batch in columns)],
        "rows": [[name, *(cell(row) for row in m["speed"])] for name, m in _named(result)] if columns else [],
    }


def _positions(result: Row) -> Row:
    return {
        "title": "Damage by position",
        "note": "Nats per token, by the tokens of context that a prediction has.",
        "header": ["model", *(f"{a + 1}–{b}" for a, b in pairwise(result["position_edges"]))],
        "rows": [[Path(m["path"]).name, *(f"{v:+.3f}" for v in m["damage_by_position"])] for m in result["models"]],
    }


def _layers(result: Row) -> Row:
    return {
        "title": "Error of each layer",
        "note": "Of the attention output, squared and relative, on the source's own inputs.",
        "header": ["model", *(f"layer {i}" for i in range(len(result["models"][0]["attention_errors"])))],
        "rows": [[Path(m["path"]).name, *(f"{e:.2e}" for e in m["attention_errors"])] for m in result["models"]],
    }
