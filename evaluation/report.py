"""The report of an evaluation: report.json, report.md, and the table on the terminal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Column = tuple[str, Callable[[dict[str, Any], dict[str, Any]], str]]


def _number(key: str, form: str) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    return lambda row, source: "–" if row.get(key) is None else format(row[key], form)


COLUMNS: list[Column] = [
    ("model", lambda row, source: row.get("name") or Path(row["path"]).name),
    ("cache", _number("cache_numbers_per_token_per_layer", ".0f")),
    (
        "kept",
        lambda row, source: format(
            row["cache_numbers_per_token_per_layer"] / source["cache_numbers_per_token_per_layer"], ".1%"
        ),
    ),
    ("bytes", _number("cache_bytes_per_token", ",.0f")),
    ("NLL", _number("nll", ".4f")),
    ("damage", _number("damage_nats", "+.4f")),
    ("KL", _number("kl", ".4f")),
    ("top-1", _number("top1_agreement", ".1%")),
    ("bits/B", _number("bits_per_byte", ".3f")),
]
LEGEND = (
    "cache: cached numbers per token per layer; bytes: of the whole cache per token, both measured from a generation's cache. "
    "NLL, damage (NLL above the source's on the same tokens) and KL (from the source) in nats per token. "
    "top-1: how often both models' most likely token is the same. bits/B: bits per byte of text."
)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table's cells, source first."""
    source = {**result["source"], "name": "source"}
    return [[cell(row, source) for _, cell in COLUMNS] for row in [source, *result["models"]]]


def table(result: dict[str, Any], title: str = "") -> "Table":
    from rich.table import Table

    out = Table(title=title or None, caption=LEGEND)
    for number, (name, _) in enumerate(COLUMNS):
        out.add_column(name, justify="right" if number else "left", no_wrap=True)
    for cells in rows(result):
        out.add_row(*cells)
    return out


def markdown(result: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows(result)]
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write report.json and report.md into `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        "# kvfold evaluation",
        "",
        f"{result['tokens']:,} predicted tokens of `{result['settings']['on']}`, windows of {result['settings']['window']}, "
        f"{result['settings']['dtype']}, kvfold {result['version']}.",
        "",
        markdown(result),
        LEGEND,
        "",
        "Relative error of each layer's attention output, on the source's own inputs:",
        "",
    ]
    layers = len(result["models"][0]["attention_errors"])
    text.append("| model | " + " | ".join(str(i) for i in range(layers)) + " |")
    text.append("|---" + "|---:" * layers + "|")
    for model in result["models"]:
        text.append(f"| {Path(model['path']).name} | " + " | ".join(f"{e:.2e}" for e in model["attention_errors"]) + " |")
    paths = [folder / "report.json", folder / "report.md"]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    paths[1].write_text("\n".join(text) + "\n")
    return paths
