"""Push: the card says what was measured, what was written by hand stays, and what arrives on a Hub is what was sent."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

from kvfold import __version__
from kvfold.convert.layouts import kvfold as kvfold_layout
from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.publishing.card import hand_made, newer_of
from kvfold.errors import UserError
from kvfold.evaluation import report
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
from tests.helpers import invoke, save_model, save_tokenizer, save_tokens
from tests.hub_server import TOKEN, Hub, Repo, running_hub

NAME = "me/tiny-gqa4"


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folded checkpoint of two shards, evaluated, its source's card with a licence beside it."""
    folder = tmp_path_factory.mktemp("push")
    source = save_model(folder / "source", "llama", vocab_size=258)
    save_tokenizer(source)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n")
    out = folder / "gqa4"
    convert(str(source), out, ConvertSettings(to="gqa", kv_heads=4, max_shard_size="200KB"))
    tokens = save_tokens(folder / "t.safetensors", 6, 40, 258)
    report.write(evaluate([str(out)], None, EvaluateSettings(on=tokens, detail="damage")), out)
    return out


@pytest.fixture
def copy(folded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folded, tmp_path / "gqa4")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


def kvfold(hub: Hub, home: Path, *args: Any) -> subprocess.CompletedProcess[str]:
    return python(hub, home, "-m", "kvfold", *args)


def python(hub: Hub, home: Path, *args: Any) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because the Hub's client reads its environment once."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_what_is_pushed_comes_back(hub: Hub, copy: Path, tmp_path: Path) -> None:
    done = kvfold(hub, tmp_path / "home", "push", copy, NAME, "--private")
    assert done.returncode == 0, done.stderr
    repo = hub.repos[NAME]
    assert repo.private
    assert done.stdout.strip() == f"{hub.url}/{NAME}/commit/{repo.commits[-1][0]}"
    here = {p.relative_to(copy).as_posix(): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert repo.commits[-1][1] == here
    assert {"model.safetensors.index.json", "README.md", "kvfold.json", "plots/positions.png"} <= set(here)
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) >= 3

    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({NAME!r}).eval()\n"
        "torch.save(model(torch.arange(20)[None]).logits.detach(), sys.argv[1])\n"
    )
    pulled = python(hub, tmp_path / "other-home", "-c", script, tmp_path / "logits.pt")
    assert pulled.returncode == 0, pulled.stderr
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(copy).eval()(torch.arange(20)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), wanted)
    snapshot = next((tmp_path / "other-home" / "hub" / "models--me--tiny-gqa4" / "snapshots").iterdir())
    for file in snapshot.rglob("*"):
        assert file.is_dir() or file.read_bytes() == here[file.relative_to(snapshot).as_posix()]

    # a second push uploads no weights again, and goes to a branch when one is named
    sent = len(hub.requests)
    again = kvfold(hub, tmp_path / "home", "push", copy, NAME, "--revision", "next")
    assert again.returncode == 0, again.stderr
    assert not any(request.startswith("PUT") for request in hub.requests[sent:])
    assert repo.branches["next"] > repo.branches["main"]


def test_the_card_tells_what_was_measured(copy: Path) -> None:
    code, text = invoke("push", copy, NAME, "--dry-run", "--base-model", "me/tiny")
    assert code == 0, text
    assert "model-00001-of-00002.safetensors" in text and "nothing was uploaded" in text
    card = ModelCard((copy / "README.md").read_text())
    row = json.loads((copy / "report.json").read_text())["models"][0]
    data = card.data
    assert (data.license, data.license_name, data.license_link) == ("other", "tiny", "LICENSE")
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("me/tiny", "transformers", "text-generation")
    assert {"kvfold", "gqa"} <= set(data.tags)
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found["damage"] == pytest.approx(row["damage_nats"], abs=1e-6)
    assert found["perplexity"] == pytest.approx(row["perplexity"], abs=1e-5)
    assert found["cache_bytes_per_token"] == 4 * 2 * 4 * 8 * 2
    assert f"{row['damage_nats']:+.4f}" in card.text
    assert "![Damage by position in the context](plots/positions.png)" in card.text
    assert f"| {NAME.split('/')[1]} | {row['damage_nats']:+.4f} |" in card.text
    assert "kv_heads 4, method align" in card.text
    assert "in windows of 40 (float32, cpu)" in card.text and "up to 39 tokens of context" in card.text
    assert "trust_remote_code" not in card.text
    assert f"vllm serve {NAME}" in card.text


def test_remote_code_and_uptraining_are_told(copy: Path) -> None:
    own_code(copy)
    record = json.loads((copy / "kvfold.json").read_text())
    recipe = {"train": "lora", "kl_weight": 1.0, "ce_weight": 0.0, "learning_rate": 0.01, "window": 512}
    run = {"recipe": recipe, "tokens": 123456, "distinct_tokens": 100000, "steps": 30, "curve": [[1, 2.0]]}
    off = [{**layer, "inconstancy": 0.02 * number} for number, layer in enumerate(record["layers"], 1)]
    (copy / "kvfold.json").write_text(json.dumps(record | {"uptraining": [run], "layers": off}))
    assert invoke("push", copy, NAME, "--dry-run")[0] == 0
    text = (copy / "README.md").read_text()
    assert f'from_pretrained("{NAME}", trust_remote_code=True)' in text
    assert "Uptraining: lora, 123,456 tokens, 100,000 of them distinct, 30 steps, window 512, weight of the KL" in text
    assert "No uptraining" not in text
    assert "varies in its most constant direction by 3.0% in the median layer and by 4.0% in the worst" in text


def own_code(copy: Path) -> None:
    """Make it look like a checkpoint whose code travels along."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": kvfold_layout.code()}))
    for name, text in kvfold_layout.files().items():
        (copy / name).write_text(text)


CODE = {
    "a file of ours that was changed": (
        lambda out: (out / "kvfold_attention.py").open("a").write("\nimport os\n"),
        "kvfold_attention.py is not as kvfold {} writes it, and whoever loads the checkpoint may run it: put kvfold's own",
    ),
    "one of the two is missing": (
        lambda out: (out / "modeling_kvfold.py").unlink(),
        "config.json names code that is not kvfold's",
    ),
    "another class": (
        lambda out: edit(out / "config.json", auto_map={"AutoModelForCausalLM": "them/evil--modeling_kvfold.Model"}),
        "config.json names code that is not kvfold's (auto_map)",
    ),
    "code for the tokenizer": (
        lambda out: edit(out / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "them/evil--a.T"]}),
        "tokenizer_config.json names code that is not kvfold's (auto_map), and whoever loads the checkpoint may run it: take",
    ),
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("case", CODE)
def test_code_of_others_is_not_uploaded(copy: Path, case: str) -> None:
    own_code(copy)
    assert invoke("push", copy, NAME, "--dry-run")[0] == 0
    (copy / "README.md").unlink()
    change, words = CODE[case]
    change(copy)
    code, text = invoke("push", copy, NAME, "--dry-run")
    assert code == 2 and words.format(__version__) in text, text
    assert not (copy / "README.md").exists()


def test_what_was_written_by_hand_stays(hub: Hub, copy: Path, tmp_path: Path) -> None:
    assert invoke("push", copy, NAME, "--dry-run")[0] == 0
    card = copy / "README.md"
    edited = card.read_text().replace("\n## Limits", "\n## STALE").replace("tags:", "thumbnail: cat.png\ntags:\n- mine")
    edited = edited.replace("<!-- kvfold:use -->", "My own words.\n\n<!-- kvfold:use -->") + "\nMore of them.\n"
    hub.repos[NAME] = Repo(False)
    hub.repos[NAME].commit("main", {"README.md": edited.encode()}, "by hand")
    done = kvfold(hub, tmp_path / "home", "push", copy, NAME)
    assert done.returncode == 0, done.stderr
    text = hub.repos[NAME].commits[-1][1]["README.md"].decode()
    assert hand_made(text) == ["My own words.", "More of them."]
    assert text.index("My own words.") < text.index("<!-- kvfold:use -->")
    assert "STALE" not in text and "## Limits" in text
    assert ModelCard(text).data.thumbnail == "cat.png"
    assert {"mine", "kvfold"} <= set(ModelCard(text).data.tags)
    assert len(ModelCard(text).data.eval_results) == 6  # not twice
    # both edited since: neither is lost
    card.write_text(text + "\nOnly here.\n")
    theirs = text + "\nOnly there.\n"
    hub.repos[NAME].commit("main", {**hub.repos[NAME].commits[-1][1], "README.md": theirs.encode()}, "by hand")
    refused = kvfold(hub, tmp_path / "home", "push", copy, NAME)
    assert refused.returncode == 2
    assert "were both edited: copy the Hub's hand-made lines into the file" in refused.stderr
    assert "Only here." in card.read_text()


def test_a_card_without_our_sections_gets_them_at_its_end(copy: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Mine\n\nWords.\n")
    assert invoke("push", copy, NAME, "--dry-run")[0] == 0
    card = ModelCard((copy / "README.md").read_text())
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert card.text.lstrip().startswith("# Mine\n\nWords.\n")
    assert hand_made(str(card)) == ["# Mine", "Words."]
    first = (copy / "README.md").read_text()
    (copy / "README.md").write_text("# Bare\n")
    assert invoke("push", copy, NAME, "--dry-run")[0] == 0
    assert ModelCard((copy / "README.md").read_text()).data.license == "other"  # the source's
    (copy / "README.md").write_text(first)
    assert invoke("push", copy, NAME, "--dry-run")[0] == 0
    assert (copy / "README.md").read_text() == first


def test_a_card_of_openings_alone_is_read_once() -> None:
    """It took the square of their number: half a minute for these."""
    opening = "<!-- kvfold:results -->"
    started = time.process_time()
    assert hand_made(opening * 20000 + "x<!-- /kvfold:results -->\nMine.") == [opening * 19999, "Mine."]
    assert time.process_time() - started < 5


def test_the_card_with_all_hand_made_lines_is_the_newer(tmp_path: Path) -> None:
    ours, theirs = "# a\n", "# a\n\nb\n"
    assert newer_of(ours, theirs, tmp_path) == newer_of(theirs, ours, tmp_path) == theirs
    assert newer_of(None, ours, tmp_path) == newer_of(ours, None, tmp_path) == ours
    assert newer_of(None, None, tmp_path) is None
    with pytest.raises(UserError, match="both edited"):
        newer_of("# a\n\nc\n", theirs, tmp_path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((NAME.split("/")[1],), "names no user or organisation: give user/tiny-gqa4"),
        (("me/a b",), "is no name for the Hub"),
        (("me/x", "--report", "nowhere"), "nowhere/report.json does not exist: measure first, with kvfold evaluate"),
    ],
)
def test_refusals(copy: Path, args: tuple[str, ...], words: str) -> None:
    code, text = invoke("push", copy, *args, "--dry-run")
    assert code == 2
    assert words in text
    assert text.count("\n") == 1
    assert not (copy / "README.md").exists()


def test_refusals_of_folders(copy: Path, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        code, text = invoke("push", copy, NAME, "--dry-run")
        assert code == 2
        assert words in text and text.count("\n") == 1

    whole = json.loads((copy / "report.json").read_text())
    moved = {**whole["models"][0], "path": "elsewhere/other"}
    (copy / "report.json").write_text(json.dumps(whole | {"models": [moved]}))
    refused("has no results of")
    (copy / "report.json").write_text(json.dumps(whole | {"schema_version": 1}))
    refused("report.json is damaged (schema_version: input should be 2, got 1): evaluate again")
    (copy / "report.json").write_text("{")
    refused("report.json is not valid JSON")
    (copy / "report.json").write_text(json.dumps(whole))
    record = json.loads((copy / "kvfold.json").read_text())
    bare = save_model(tmp_path / "bare", "llama")
    (copy / "kvfold.json").write_text(json.dumps(record | {"source": str(bare)}))
    refused("is not known, no README.md there states one: give it with --license")
    (copy / "README.md").write_text("---\nlicense: [\n---\n")
    refused("cannot be read")
    (copy / "kvfold.json").unlink()
    refused("has no kvfold.json: push what kvfold convert wrote")


def test_refusals_of_the_hub(hub: Hub, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so by the client's constants in place of its environment."""
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))

    def refused(
        words: str, *args: str, name: str = NAME, url: str = hub.url, token: str | None = TOKEN, offline: bool = False
    ) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", token or "")
        code, text = invoke("push", copy, name, *args)
        assert code == 2
        assert words in text and text.count("\n") == 1
        assert not (copy / "README.md").exists()

    refused("no token for the Hub: run `hf auth login`", token=None)
    refused("the token is not valid: run `hf auth login` again", token="hf_wrong")
    refused("the token may not write there", name="you/model")
    refused("the Hub did not answer: check the network, or try with --dry-run", url=nowhere)
    refused("the Hub did not answer", offline=True)
    hub.repos[NAME] = Repo(False)
    refused("exists and is public: make it private in its settings, or leave --private out", "--private")

    record = json.loads((copy / "kvfold.json").read_text())
    (copy / "kvfold.json").write_text(json.dumps(record | {"source": "big/source"}))
    hub.repos["big/source"] = Repo(False, "manual")
    hub.repos["big/source"].commit("main", {"README.md": b"---\nlicense: llama3.1\n---\n"}, "card")
    refused("big/source is gated: its terms (llama3.1) bind what you publish. Read them, then confirm with --license NAME")
    hub.repos["big/source"] = Repo(False)
    refused("the card of big/source states no licence: give it with --license")
    refused("the licence of big/source could not be looked up", url=nowhere)
