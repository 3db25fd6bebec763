"""The results behind the tables of README and docs: docs/results/MODEL.json, which benchmarks and `kvfold evaluate` wrote.

    python benchmarks/results.py keep MODEL FILE…    takes over evaluate's JSON, or results.json of real_models.py
    python benchmarks/results.py check               compares every table of numbers with its results (make docs)

A table names its results in a comment above it, `<!-- results: smollm2-135m -->`. Each of its numbers must then stand in that
file, rounded, as what the column shows: with a cache column, in a result of the row's cache. To add a row: run the benchmark,
keep its result, write the row.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvfold.surgery.names import PUBLISHED

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BASELINES = ("mean", "first", "random", "align")
"""Methods to fewer heads beside the default, which results are called by."""
SETTINGS = ("calibration_tokens", "heal_steps", "heal_batch_tokens")
RECIPE = ("train", "kl_weight", "ce_weight", "learning_rate", "window", "batch")
KEYS = {"cache": "cache_numbers_per_token_per_layer", "cache kept": "kv_budget"}
"""Columns that say which results a row is of."""
COLUMNS = {  # what stands at the head of a column → the fields that its numbers may be
    r"kept": ("kv_budget",),
    r"nll": ("nll",),
    r"kl": ("kl", "kl_interval"),
    r"top-1.*": ("top1_agreement",),
    r"damage|closed form|healed|converted|uptrained|published.*": ("damage_nats", "damage_interval"),
}
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?%?(?![\w])")
Json = Any


def entries(data: dict[str, Json]) -> Iterator[tuple[str, dict[str, Json]]]:
    """Name and result of every model in evaluate's JSON, or of every result of real_models.py for one source; no paths."""
    alone = "models" in data
    for result in data["models"] if alone else [r for r in data.values() if "damage_nats" in r]:
        target, settings = result["conversion"]["target"], result["conversion"]["settings"]
        stage = {"closed": "closed form"}.get(result["stage"], result["stage"])
        cache = round(result["cache_numbers_per_token_per_layer"], 2)
        way = [target["method"]] if target["method"] in PUBLISHED else [target["to"], target["layout"], target.get("design")]
        if target["method"] in PUBLISHED:
            way.append(f"{target['kv_rank']}+{target['rope_dim']}")
        way += [target["method"]] if target["method"] in BASELINES else []
        way += [settings["layer_budgets"]] if settings["layer_budgets"] != "uniform" else []
        texts = (settings.get("calibrate") or "").split(",")
        way += [f"{len(texts)}-texts"] if len(texts) > 1 else []
        way += ["self"] if any(text.partition(":")[0] == "self" for text in texts) else []
        way += ["mean-sizes"] if settings.get("key_norm") == "mean" else []
        healed = stage != "closed form" and settings["heal_steps"] and settings.get("calibrate", True)
        steps = [f"{settings['heal_steps']}x{settings['heal_batch_tokens']}"] if healed else []
        trained = [
            {**{key: entry["recipe"][key] for key in RECIPE}, **{key: entry[key] for key in ("tokens", "distinct_tokens")}}
            for entry in result["conversion"].get("uptraining", [])
        ]
        steps += [f"{entry['train']}-{'kl' if entry['kl_weight'] else 'ce'}-{entry['tokens']}" for entry in trained]
        name = "-".join(map(str, [*way, f"{cache:g}", stage.replace(" ", "-"), *steps]))
        kept = ("nll", "damage_nats", "damage_interval", "kl", "kl_interval", "top1_agreement", "damage_by_position")
        yield (
            name,
            {
                "method": target["method"],
                "target": {key: target[key] for key in ("to", "layout", "kv_heads", "kv_rank", "rope_dim") if key in target},
                "stage": stage,
                **{key: settings[key] for key in SETTINGS},
                **({"uptraining": trained} if trained else {}),
                "cache_numbers_per_token_per_layer": cache,
                "kv_budget": result["conversion"]["kv_budget"],
                **{key: result[key] for key in kept},
                "seconds": result["conversion"].get("seconds"),
                "tokens": data["tokens"] if alone else next(r["tokens"] for r in data.values() if "tokens" in r),
                "kvfold": data["version"] if alone else result["version"],
                **({"measured_on": data["device"]} if "device" in data else {}),
                "wrote": "kvfold evaluate --json" if alone else "benchmarks/real_models.py",
            },
        )


def keep(model: str, files: list[Path], folder: Path = RESULTS) -> None:
    """Take results over into `folder`/MODEL.json; one of the same name is replaced."""
    path = folder / f"{model}.json"
    held: dict[str, Json] = json.loads(path.read_text()) if path.exists() else {}
    for file in files:
        data = json.loads(file.read_text())
        if "models" not in data:
            data = {key: r for key, r in data.items() if r["model"] == model}
        own = data["source"] if "models" in data else next(r for r in data.values() if "row" not in r)
        held["source"] = {key: own[key] for key in ("nll", "parameters", "cache_numbers_per_token_per_layer")}
        held |= entries(data)
    path.write_text(json.dumps(dict(sorted(held.items())), indent=1, ensure_ascii=False) + "\n")


def tables(text: str) -> Iterator[tuple[str, str | None, list[list[str]]]]:
    """Of every table with a column of numbers: the heading above it, the results that it names, and its cells."""
    heading, named, lines = "", None, [*text.splitlines(), ""]
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows and any(re.fullmatch(r"-+:", cell) for cell in rows[1]):
            yield heading, named, [rows[0], *rows[2:]]
        if rows:
            rows, named = [], None
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif found := re.fullmatch(r"<!-- results: ([\w.-]+) -->", line):
            named = found[1]


def numbers(data: Json) -> Iterator[float]:
    """Every number in JSON data."""
    if isinstance(data, (dict, list)):
        for part in data.values() if isinstance(data, dict) else data:
            yield from numbers(part)
    elif isinstance(data, (int, float)) and not isinstance(data, bool):
        yield float(data)


def matches(written: str, value: float) -> bool:
    """Whether a number in a table is `value`, rounded as it is written."""
    text = written.rstrip("%").replace(",", "")
    digits = len(text.partition(".")[2])
    return abs(float(text) - value * (100 if written.endswith("%") else 1)) <= 0.5 * 10**-digits * (1 + 1e-9)


def unfounded(page: Path) -> Iterator[str]:
    """A line on every number in a table that its results do not hold."""
    for heading, named, (header, *rows) in tables(page.read_text()):
        where = f"{page.name}, {heading}"
        if named is None:
            yield f"{where}: the table {header} names no results"
            continue
        held: dict[str, Json] = json.loads((RESULTS / f"{named}.json").read_text())
        for row in rows:
            of_row = list(held.values())
            for column, cell in zip(header, row, strict=True):
                if field := KEYS.get(column):
                    of_row = [e for e in of_row if field in e and any(matches(n, e[field]) for n in NUMBER.findall(cell))]
            for column, cell in zip(header[1:], row[1:], strict=True):
                fields = next((f for pattern, f in COLUMNS.items() if re.fullmatch(pattern, column, re.IGNORECASE)), None)
                offered = [[entry.get(field) for field in fields] for entry in of_row] if fields else held
                for number in [] if column in KEYS else NUMBER.findall(cell):
                    if not any(matches(number, value) for value in numbers(offered)):
                        yield f"{where}: {number} in {row[0]}, {column}, is no result in docs/results/{named}.json"


def main() -> None:
    if sys.argv[1:2] == ["keep"] and len(sys.argv) > 3:
        keep(sys.argv[2], [Path(name) for name in sys.argv[3:]])
    elif sys.argv[1:] == ["check"]:
        wrong = [line for page in PAGES for line in unfounded(page)]
        print("\n".join(wrong) or "every table's numbers stand in its results")
        sys.exit(bool(wrong))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
