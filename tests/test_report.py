"""The rest of the report: intervals, positions, needles, decoding, resuming, several processes, memory, and the page."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from transformers import AutoModelForCausalLM, LlamaConfig

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.evaluation import damage, labels, plots, report, retrieval, schema, speed
from kvfold.evaluation.evaluate import evaluate, stage_of
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.evaluation.unfinished import PARTIAL
from tests.helpers import invoke, save_model, save_tokenizer, save_tokens


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two folds of a tiny model and the source itself, in one report."""
    folder = tmp_path_factory.mktemp("measured")
    source = save_model(folder / "source", "llama")
    convert(str(source), folder / "gqa", ConvertSettings(to="gqa", kv_heads=4))
    convert(str(source), folder / "mqa", ConvertSettings(to="mqa", method="mean"))
    tokens = save_tokens(folder / "t.safetensors", 12, 48)
    names = [str(folder / name) for name in ("gqa", "mqa", "source")]
    result = evaluate(names, str(source), EvaluateSettings(on=tokens, batch=2, detail="quick"))
    return {"folder": folder, "tokens": tokens, "names": names, "result": result}


def test_intervals_are_those_of_the_mean() -> None:
    """Of 400 windows from a known distribution: as wide as the normal approximation, around the mean; the same twice."""
    values = torch.randn(400, 10, generator=torch.Generator().manual_seed(1)) + 2
    low, high = damage.interval(values) or (0.0, 0.0)
    mean, deviation = values.mean().item(), values.mean(1).std().item() / 20
    assert low == pytest.approx(mean - 1.96 * deviation, abs=0.2 * deviation)
    assert high == pytest.approx(mean + 1.96 * deviation, abs=0.2 * deviation)
    assert damage.interval(values) == [low, high]
    assert damage.interval(values[:1]) is None


def test_positions_are_cut_without_a_gap() -> None:
    values = torch.arange(47.0).expand(3, -1)
    edges = damage.position_edges(47)
    assert edges[0] == 0 and edges[-1] == 47 and len(edges) == 17
    means = damage.by_position(values, edges)
    weights = [b - a for a, b in pairwise(edges)]
    assert sum(m * w for m, w in zip(means, weights, strict=True)) == pytest.approx(values[0].sum().item())
    assert means[0] == pytest.approx((weights[0] - 1) / 2)
    assert damage.position_edges(3) == [0, 1, 2, 3]


def test_damage_by_position_adds_up(measured: dict[str, Any]) -> None:
    result = measured["result"]
    for model in result["models"]:
        edges = result["position_edges"]
        parts = [m * (b - a) for m, (a, b) in zip(model["damage_by_position"], pairwise(edges), strict=True)]
        assert sum(parts) / edges[-1] == pytest.approx(model["damage_nats"], abs=1e-5)
        assert model["damage_interval"][0] <= model["damage_nats"] <= model["damage_interval"][1]
    assert result["models"][2]["damage_by_position"] == pytest.approx([0.0] * 16, abs=1e-6)


class Copier(torch.nn.Module):
    """Predicts what followed the last occurrence of the present token pair within `reach`: finds every needle it sees."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.device, self.config = torch.device("cpu"), None

    def base_model(self, ids: torch.Tensor, use_cache: bool) -> Any:
        guesses = torch.zeros(*ids.shape, 128)
        for row, line in enumerate(ids.tolist()):
            for t in range(1, len(line)):
                before = [s for s in range(1, t) if line[s - 1 : s + 1] == line[t - 1 : t + 1] and t - s <= self.reach]
                if before:
                    guesses[row, t, line[before[-1] + 1]] = 10.0
        return type("Out", (), {"last_hidden_state": guesses})

    def get_output_embeddings(self) -> Any:
        return lambda hidden: hidden


def test_needles_are_found_by_what_can_find_them() -> None:
    """Windows of tokens that repeat nowhere: copying finds all within its reach and nothing beyond, nor without the needle."""
    windows = torch.stack([torch.randperm(128, generator=torch.Generator().manual_seed(row))[:96] for row in range(6)])
    grid = retrieval.NeedleGrid((0.0, 0.5, 1.0), 1, 4)
    sees_all = retrieval.find_needles(Copier(96), windows, grid)  # type: ignore[arg-type]
    assert sees_all is not None
    assert (sees_all["key_tokens"], sees_all["value_tokens"], sees_all["trials"]) == (8, 16, 4)
    assert [cell["recall"] for cell in sees_all["cells"]] == [1.0, 1.0, 1.0]
    assert all(cell["blind"] < 0.1 and cell["gain_nats"] > 3 for cell in sees_all["cells"])
    near = retrieval.find_needles(Copier(30), windows, grid)  # type: ignore[arg-type]
    assert near is not None
    recalls = {cell["depth"]: cell["recall"] for cell in near["cells"]}
    assert recalls[1.0] == 1.0 and recalls[0.0] < 0.1
    assert retrieval.find_needles(Copier(9), windows[:2], grid) is None  # type: ignore[arg-type]
    assert retrieval.find_needles(Copier(9), windows[:, :20], grid) is None  # type: ignore[arg-type]


def test_the_demo_model_finds_needles(demo_model: Path, tmp_path: Path) -> None:
    """Far above guessing, and better the nearer the needle lies."""
    from kvfold.convert.source.data import load_windows
    from kvfold.recipes.demo.demo import write_texts

    windows = load_windows(str(write_texts(tmp_path)[1]), demo_model, 256, 8192, overlap=1).ids
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    found = retrieval.find_needles(model, windows, retrieval.NeedleGrid((0.0, 1.0), 1, 16))
    assert found is not None
    far, near = found["cells"]
    assert near["recall"] > far["recall"] > far["blind"]
    assert near["gain_nats"] > 1.0


def test_decoding_is_measured_over_context_and_batch(measured: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(measured["folder"] / "gqa")
    rows = speed.measure_speed(model, 32, speed.SpeedGrid(2, True, (1, 3), 4), 512)
    assert [(row["context"], row["batch"]) for row in rows] == [(c, b) for c in (16, 32, 64, 124) for b in (1, 3)]
    for row in rows:  # 4 heads of 8, keys and values, float32, 2 layers; and the steps are cached as well
        assert row["cache_bytes"] == (row["context"] + 4) * row["batch"] * 2 * 4 * 8 * 4 * 2
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_bytes"] is None
    (too_large,) = speed.measure_speed(model, 32, speed.SpeedGrid(1, False, (1,), 4), 1e15)
    assert too_large == {"context": 32, "batch": 1, **speed.NOTHING}


def test_stages() -> None:
    settings = {"calibrate": "text", "heal_steps": 5}
    assert stage_of(None) == "unknown"
    assert stage_of({"settings": settings, "uptraining": []}) == "healed"
    assert stage_of({"settings": {**settings, "heal_steps": 0}, "uptraining": []}) == "closed form"
    assert stage_of({"settings": {"calibrate": None, "heal_steps": 5}, "uptraining": []}) == "closed form"
    assert stage_of({"settings": settings, "uptraining": [{"tokens": 1}]}) == "uptrained"


def test_pareto_front_has_what_nothing_beats() -> None:
    sizes = [(8, 2.0), (8, 1.0), (16, 1.5), (32, 0.5), (64, 0.6)]
    models = [{"cache_bytes_per_token": x, "damage_nats": y} for x, y in sizes]
    front = plots.pareto_front({"models": models})
    assert [(m["cache_bytes_per_token"], m["damage_nats"]) for m in front] == [(8, 1.0), (32, 0.5)]


def test_report_is_whole_and_self_contained(measured: dict[str, Any], tmp_path: Path) -> None:
    paths = report.write(measured["result"], tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert schema.read_report(tmp_path) == measured["result"]
    with pytest.raises(ValueError, match="damage_nats"):
        broken = {**measured["result"]["models"][0], "damage_nats": "much"}
        schema.Report.model_validate({**measured["result"], "models": [broken]})
    page = paths[2].read_text()
    assert re.findall(r"""(?:src|srcset|href)=["'](?!data:)""", page) == []
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("data:image/svg+xml;base64,") == 2 * len(plots.FIGURES)
    for model in measured["result"]["models"]:
        assert f"{model['damage_nats']:+.4f}" in page
    # the number that matters stands on a phone's first screen: in the sentence on top, and in the table's second column
    best = min(measured["result"]["models"], key=lambda model: model["damage_nats"])
    sentence = page.split('<p class="lead">')[1].split("</p>")[0]
    assert f"{best['damage_nats']:+.4f}" in sentence and page.index(sentence) < page.index("<table>")
    assert re.findall(r'<th scope="col">(.*?)</th>', page)[:4] == ["model", "damage", "kept", "KL"]
    pngs = {path.name: path.read_bytes()[:4] for path in (tmp_path / report.PLOTS).iterdir()}
    assert pngs == {f"{name}.png": b"\x89PNG" for name in plots.FIGURES}
    assert all(f"({report.PLOTS}/{name})" in paths[1].read_text() for name in pngs)


def test_every_plot_names_quantity_and_unit(measured: dict[str, Any]) -> None:
    units = ("bytes per token", "nats per token", "tokens", "layer", "ratio", "%", "depth")
    with plots.themed("light") as colors:
        drawn = plots.figures(measured["result"], colors)
    assert list(drawn) == list(plots.FIGURES)
    for figure in drawn.values():
        shown = [axes for axes in figure.axes if axes.axison]
        labels = [label for axes in shown for label in (axes.get_xlabel(), axes.get_ylabel()) if label]
        labels += [text for text in (figure.get_supxlabel(), figure.get_supylabel()) if text]
        assert len(labels) >= 2 and all(any(unit in label for unit in units) for label in labels)
        assert all(axes.get_title() for axes in shown)


@pytest.mark.parametrize("crowded", [(0.9, 1.0, 1.1), (0.2, 0.21, 0.22), (5.0, 5.1, 5.2)])
def test_names_lie_on_no_mark_and_no_other_name(crowded: tuple[float, ...]) -> None:
    """Five marks above each other, three of which are named."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    marks = [(x, y) for x in (1.0, 2.0) for y in (*crowded, 2.0, 3.0)]
    axes.scatter(*zip(*marks, strict=True))
    labels.place(figure, axes, [((1.0, y), f"model-{y}-uptrained") for y in crowded], marks)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [f"model-{y}-uptrained" for y in crowded]
    assert not any(box.contains(*axes.transData.transform(mark)) for box in boxes for mark in marks)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(axes.get_window_extent().padded(1).containsx(x) for box in boxes for x in (box.x0, box.x1))


def test_without_matplotlib_the_numbers_are_still_written(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert [path.name for path in report.write(measured["result"], tmp_path)] == ["report.json", "report.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_damage_alone(measured: dict[str, Any], tmp_path: Path) -> None:
    """The same damage as with everything else, and a report of what was measured."""
    code, _ = invoke(
        *("evaluate", measured["names"][0], "--against", measured["names"][2], "--on", measured["tokens"], "--batch", 2),
        *("--damage-only", "--report", tmp_path),
    )
    assert code == 0
    result = schema.read_report(tmp_path)
    for key in ("nll", "damage_interval", "kl", "cache_bytes_per_token", "attention_errors"):
        assert result["models"][0][key] == measured["result"]["models"][0][key]
    assert result["source"]["needles"] is None and result["source"]["speed"] == []
    text = (tmp_path / "report.md").read_text()
    assert "## Damage by position" in text and "## Needles" not in text and "## Decoding" not in text
    assert sorted(path.stem for path in (tmp_path / report.PLOTS).iterdir()) == ["layers", "positions"]
    gqa = Path(measured["names"][0])
    assert report.for_card(tmp_path, gqa)[2] == "plots/positions.png"
    report.write(measured["result"], tmp_path)  # with something to compare
    assert report.for_card(tmp_path, gqa)[2] == "plots/damage.png"


def test_an_interrupted_evaluation_goes_on(measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokens, folder = measured["names"][2], measured["tokens"], tmp_path / "report"
    models = [shutil.copytree(name, tmp_path / Path(name).name) for name in measured["names"][:2]]
    weights = (models[1] / "model.safetensors").read_bytes()
    (models[1] / "model.safetensors").write_bytes(weights[:-1])
    args = ("evaluate", *models, "--against", source, "--on", tokens, "--batch", 2, "--quick", "--report", folder)
    code, text = invoke(*args)
    assert code == 2
    assert f"1 of 2 models are measured and kept in {folder / PARTIAL}: repeat the command to go on" in text
    (models[1] / "model.safetensors").write_bytes(weights)

    scored: list[str] = []
    measure_once = retrieval.find_needles
    monkeypatch.setattr(
        retrieval, "find_needles", lambda model, *rest: scored.append(model.name_or_path) or measure_once(model, *rest)
    )
    assert invoke(*args)[0] == 0
    assert scored == [source, str(models[1])]  # and not the first model again
    found = json.loads((folder / "report.json").read_text())
    for key in ("nll", "damage_nats", "kl", "damage_by_position", "needles", "attention_errors"):
        assert [m[key] for m in found["models"]] == [m[key] for m in measured["result"]["models"][:2]]
    assert not (folder / PARTIAL).exists()
    # other settings take nothing from there, nor is anything made of a torn file
    (folder / PARTIAL).write_text("{")
    scored.clear()
    assert invoke(*args, "--batch", 3)[0] == 0
    assert len(scored) == 3


def test_two_processes_give_the_numbers_of_one(measured: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "kvfold", "evaluate"]
    command += [measured["names"][0], "--against", measured["names"][2], "--on", measured["tokens"], "--batch", "2", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, "--report", str(tmp_path)], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    found, wanted = schema.read_report(tmp_path), measured["result"]
    assert found["tokens"] == wanted["tokens"]
    for ours, theirs in ((found["source"], wanted["source"]), (found["models"][0], wanted["models"][0])):
        for key in ours.keys() - {"speed"}:
            assert ours[key] == theirs[key], key
    assert done.stdout.count("report:") == 1


def test_other_tokenizers_are_refused(measured: dict[str, Any], tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", vocab_size=260)
    save_tokenizer(source, merges=[("a", "b")])
    convert(str(source), tmp_path / "out", ConvertSettings(to="mqa"))
    (tmp_path / "text.txt").write_text("abc " * 100)
    args = ("evaluate", tmp_path / "out", "--on", tmp_path / "text.txt", "--window", 20, "--quick", "--report", tmp_path / "r")
    assert invoke(*args)[0] == 0
    shutil.rmtree(tmp_path / "r")
    save_tokenizer(tmp_path / "out")
    code, text = invoke(*args)
    assert code == 2
    assert "have different tokenizers: copy the source's tokenizer files there" in text
    assert not (tmp_path / "r").exists()


MEMORY = """
import resource, sys
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
import torch
source, tokens = sys.argv[1:]
evaluate([source], source, EvaluateSettings(on=tokens, detail="quick"))  # all but the logits of many tokens
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluate([source], source, EvaluateSettings(on=tokens.replace("short", "long"), detail="quick"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_large_vocabulary_stays_within_a_gibibyte(tmp_path: Path) -> None:
    """A vocabulary of 128k and a window of 2048: its logits in one piece take 1 GiB, and scoring holds several such pieces."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_tokens(tmp_path / "short.safetensors", 2, 4, 32768)
    save_tokens(tmp_path / "long.safetensors", 1, 2048, 32768)
    tokens = f"{tmp_path / 'short.safetensors'}:calibration"
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model"), tokens]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**30
