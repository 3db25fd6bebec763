"""lm-eval on task files of one's own, offline; and its rolling log-likelihood, which is our NLL."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvfold.convert.source.data import load_windows
from kvfold.evaluation import report
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.recipes.demo.corpus import HELDOUT, standard_library
from tests.helpers import invoke, save_tokens

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.5
"""
ROLLING = """task: {name}
dataset_path: text
dataset_kwargs:
  data_files:
    test: {data}
  sample_by: document
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvfold[tasks]'")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which line follows: Python, or the same letters backwards. One folder for all, because lm-eval takes seconds to index."""
    documents = [
        {"text": "import os\nimport ", "good": "sys\n", "bad": "\nsys"},
        {"text": "def __init__(self):\n    self", "good": ".", "bad": ")"},
        {"text": "for i in ", "good": "range(", "bad": "(egnar"},
        {"text": "if x is not ", "good": "None:", "bad": ":enoN"},
    ]
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "lines.yaml").write_text(TASK.format(name="python_lines", data=folder / "lines.jsonl"))
    (folder / "broken.yaml").write_text(TASK.format(name="broken_lines", data=folder / "nowhere.jsonl"))
    return folder


def test_a_task_of_ones_own_is_merged_into_the_report(lm_eval: Any, demo_model: Path, tasks: Path, tmp_path: Path) -> None:
    tokens = save_tokens(tmp_path / "t.safetensors", 4, 40, 2048)
    args = ("--on", tokens, "--tasks", "python_lines", "--include-path", tasks, "--report", tmp_path / "report", "--quick")
    code, text = invoke("evaluate", demo_model, "--against", demo_model, *args)
    assert code == 0, text
    result = json.loads((tmp_path / "report" / "report.json").read_text())
    for found in (result["source"], *result["models"]):
        task = found["tasks"]["python_lines"]
        assert task["samples"] == 4
        assert task["version"] == "1.5"
        assert task["metrics"]["acc"]["value"] == 1.0
        assert task["metrics"]["acc"]["stderr"] == 0.0
    assert "python_lines acc" in (tmp_path / "report" / "report.md").read_text()
    assert "python_lines acc" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "python_line"), "unknown task 'python_line': did you mean python_lines"),
        (("--tasks", "zzzzqqqq"), "unknown task 'zzzzqqqq': `lm-eval ls tasks` lists them"),
        (("--tasks", "broken_lines"), "task broken_lines does not load"),
        (("--tasks", "arc_easy"), "task arc_easy does not load"),
    ],
)
def test_tasks_that_cannot_be_run(
    lm_eval: Any, demo_model: Path, tasks: Path, tmp_path: Path, flags: tuple[str, str], words: str
) -> None:
    tokens = save_tokens(tmp_path / "t.safetensors", 4, 40, 2048)
    out = tmp_path / "report"
    args = ("--on", tokens, "--include-path", tasks, "--report", out, *flags)
    code, text = invoke("evaluate", demo_model, "--against", demo_model, *args)
    assert code == 2
    assert words in text
    assert text.count("\n") == 1
    assert not out.exists()


def test_rolling_likelihood_of_lm_eval_is_our_nll(lm_eval: Any, demo_model: Path, tasks: Path, tmp_path: Path) -> None:
    """On a file of several windows: both predict every token once, windows after the first from one token of context on."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    window, rows = 128, 6
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = tokenizer("\n".join(standard_library(HELDOUT))[:20000])["input_ids"][: 1 + rows * (window - 1)]
    text = tokenizer.decode(ids[1:])
    assert tokenizer(text)["input_ids"] == ids  # cut where the tokenizer cuts
    (tmp_path / "text.txt").write_text(text)
    windows = load_windows(str(tmp_path / "text.txt"), demo_model, window, 10**6, overlap=1)
    assert windows.ids.shape == (rows, window)
    ours = evaluate(
        [str(demo_model)], str(demo_model), EvaluateSettings(on=str(tmp_path / "text.txt"), window=window, detail="quick")
    )

    (tasks / "rolling.yaml").write_text(ROLLING.format(name="rolling_text", data=tmp_path / "text.txt"))
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    # the tokenizer would put its first token before the text, which lm-eval's prefix does already
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=window - 1, add_bos_token=False)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    done = lm_eval.simple_evaluate(model=theirs, tasks=["rolling_text"], task_manager=manager, log_samples=False)
    bits = done["results"]["rolling_text"]["bits_per_byte,none"]
    nll = bits * torch.tensor(2.0).log().item() * len(text.encode()) / (rows * (window - 1))
    assert ours["source"]["nll"] == pytest.approx(nll, abs=1e-3)
    assert ours["source"]["bits_per_byte"] == pytest.approx(bits, abs=1e-3)


def test_flags_are_checked_without_lm_eval(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = save_tokens(tmp_path / "t.safetensors", 4, 40, 2048)

    def refused(*flags: str) -> str:
        out = tmp_path / "report"
        code, text = invoke("evaluate", demo_model, "--against", demo_model, "--on", tokens, "--report", out, *flags)
        assert code == 2
        assert not out.exists()
        return text

    assert "tasks: value error, is empty: name one or more, separated by commas" in refused("--tasks", " , ")
    assert "--include-path nowhere is no folder" in refused("--include-path", "nowhere")
    assert "limit: input should be greater than 0" in refused("--limit", "0")
    assert "--damage-only, --quick, --full and --detail exclude each other" in refused("--quick", "--full")


def test_without_tasks_nothing_of_lm_eval_is_shown() -> None:
    row = {"path": "a", "tasks": {}}
    assert report._tasks({"source": row, "models": [row]})["rows"] == []
