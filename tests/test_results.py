"""Every number in a table of README and docs stands in results that a benchmark wrote."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import plot_results
import results

TABLE = """## Here

<!-- results: model -->

| | cache | damage | KL | note |
|---|---:|---:|---:|---:|
| MLA | 96 | **0.140** (0.113 … 0.166) | 0.293 | 131,072 |
"""


def evaluated(**changes: Any) -> dict[str, Any]:
    """evaluate's JSON with one model."""
    settings = {"layer_budgets": "uniform", "heal_steps": 120, "heal_batch_tokens": 4096, "calibration_tokens": 131072}
    target = {"to": "mla", "layout": "kvfold", "design": "latent", "method": "kvfold", "kv_rank": 48, "rope_dim": 48}
    model = {
        "path": "/somewhere/out",
        "stage": "healed",
        "cache_numbers_per_token_per_layer": 96.0,
        "nll": 3.5197,
        "damage_nats": 0.13979,
        "damage_interval": [0.1131, 0.1658],
        "kl": 0.29341,
        "kl_interval": [0.28, 0.31],
        "top1_agreement": 0.71826,
        "damage_by_position": [0.1],
        "conversion": {"target": target, "settings": settings, "kv_budget": 0.25, "seconds": 3640.3},
    }
    source = {"nll": 3.38, "parameters": 134515008, "cache_numbers_per_token_per_layer": 384.0, "path": "/somewhere/source"}
    return {"version": "0.1.0", "tokens": 16352, "source": source, "models": [{**model, **changes}]}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for number, data in enumerate((evaluated(), evaluated(cache_numbers_per_token_per_layer=48.0, kl=0.5))):
        (tmp_path / f"{number}.report").write_text(json.dumps(data))
        results.keep("model", [tmp_path / f"{number}.report"], tmp_path)
    (tmp_path / "page.md").write_text(TABLE)
    return tmp_path / "page.md"


def test_the_pages_of_this_repository_hold_no_other_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["results.py", "check"])
    with pytest.raises(SystemExit) as left:
        results.main()
    assert left.value.code == 0
    assert sum(1 for path in results.PAGES for _ in results.tables(path.read_text())) > 8
    assert not [path for path in results.RESULTS.glob("*.json") if "/" in path.read_text().replace("benchmarks/", "")]


def test_what_is_kept_has_no_paths_and_replaces_what_it_repeats(page: Path) -> None:
    held = json.loads((page.parent / "model.json").read_text())
    assert set(held) == {"source", *(f"mla-kvfold-latent-{cache}-healed-120x4096" for cache in (96, 48))}
    assert "somewhere" not in json.dumps(held)
    (page.parent / "0.report").write_text(json.dumps(evaluated(damage_nats=0.1)))
    results.keep("model", [page.parent / "0.report"], page.parent)
    assert json.loads((page.parent / "model.json").read_text())["mla-kvfold-latent-96-healed-120x4096"]["damage_nats"] == 0.1


def test_other_texts_are_another_result() -> None:
    """One text, another beside it, and one that the source writes."""
    names = []
    for text in ("a.txt", "a.txt,b.txt", "a.txt,self:65536"):
        data = evaluated()
        data["models"][0]["conversion"]["settings"]["calibrate"] = text
        names += [name for name, _ in results.entries(data)]
    assert len(set(names)) == 3 and "2-texts-self" in names[2], names


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ("0.140", "0.140", []),
        ("0.140", "0.141", ["0.141 in MLA, damage"]),
        ("0.140", "0.14", []),
        ("0.166", "0.167", ["0.167 in MLA, damage"]),
        ("0.293", "0.500", ["0.500 in MLA, KL"]),  # the result of another cache
        ("96", "48", ["0.293 in MLA, KL"]),
        ("131,072", "131,071", ["131,071 in MLA, note"]),
        ("<!-- results: model -->", "", ["names no results"]),
    ],
)
def test_a_number_that_is_no_result_is_found(page: Path, written: str, instead: str, said: list[str]) -> None:
    page.write_text(TABLE.replace(written, instead))
    found = list(results.unfounded(page))
    assert len(found) == len(said) and all(words in line for words, line in zip(said, found, strict=True)), found


def test_the_plot_shows_every_result_with_its_name() -> None:
    held = json.loads((results.RESULTS / "smollm2-135m.json").read_text())
    shown = plot_results.best([result for key, result in held.items() if key != "source"])
    (axes,) = plot_results.draw("smollm2", shown).axes
    assert len(axes.texts) == len(shown) > 6
    assert {text.get_text() for text in axes.texts} >= {"TransMLA", "CARE", "MLA", "MLA, keys rebuilt"}
