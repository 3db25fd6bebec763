"""report.html: one file with everything in it, for a phone as for a desk, light or dark."""

import base64
import io
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from kvfold.evaluation import plots


def write_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write every plot as a PNG on white into `folder`, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with plots.themed("light") as colors:
        for name, figure in plots.figures(report, colors).items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=160, facecolor="white", metadata={"Software": None})
    return paths


def page(report: dict[str, Any], tables: list[dict[str, Any]], legend: str) -> str:
    """The page. `tables` are `{"title", "note", "header", "rows"}`, all cells text."""
    drawn = {theme: _svgs(report, theme) for theme in plots.THEMES}
    shown = [
        {"name": name, "note": plots.FIGURES[name][1], "light": drawn["light"][name], "dark": drawn["dark"][name]}
        for name in drawn["light"]
    ]
    template = files("kvfold.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        report=report, tables=tables, legend=legend, plots=shown, best=_least_damage(report)
    )


def _least_damage(report: dict[str, Any]) -> dict[str, str]:
    """The line that a reader sees first."""
    model = min(report["models"], key=lambda m: m["damage_nats"])
    kept = model["cache_numbers_per_token_per_layer"] / report["source"]["cache_numbers_per_token_per_layer"]
    ends = model["damage_interval"]
    return {
        "name": plots.name_of(model),
        "damage": f"{model['damage_nats']:+.4f}",
        "kept": f"{kept:.1%}",
        "interval": f" (95% interval {ends[0]:+.4f} … {ends[1]:+.4f})" if ends else "",
    }


def _svgs(report: dict[str, Any], theme: str) -> dict[str, str]:
    """Each plot as a data URI; letters are drawn as paths, so no font is needed."""
    found = {}
    with plots.themed(theme) as colors:
        for name, figure in plots.figures(report, colors).items():
            out = io.BytesIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
            found[name] = "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
    return found
