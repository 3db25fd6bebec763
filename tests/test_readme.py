"""What the README and docs/ say can be typed, and leads somewhere."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvfold.recipes.demo.demo import MODEL, write_texts
from tests.helpers import invoke, save_model, save_tokenizer, save_tokens

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
MARK = "<!-- tests/test_readme.py runs this block -->\n```sh\n"


def test_the_block_on_the_demo_runs(tmp_path: Path) -> None:
    """Verbatim but for the environment, which is this one, and for healing and calibration, which are cut short."""
    block = TEXT.split(MARK)[1].split("```")[0]
    lines = [line for line in block.splitlines() if "activate" not in line]
    assert [line.split()[1] for line in lines] == ["plan", "convert", "evaluate"]
    (tmp_path / "kvfold-demo").mkdir()
    (tmp_path / "kvfold-demo" / "source").symlink_to(MODEL)
    write_texts(tmp_path / "kvfold-demo")
    short = {"convert": " --heal-steps 2 --calibration-tokens 4096", "evaluate": " --batch 4 --quick"}
    script = "\n".join(["set -e", *(line + short.get(line.split()[1], "") for line in lines)])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    assert "25.0% of the source's cache" in ran.stdout
    assert "damage" in ran.stdout
    assert (tmp_path / "my-gqa" / "report.html").exists()


BLOCKS = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
LLAMAS = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-70B", "smollm2-135m", "stories260k", "kvfold-demo/source")
HALVES = [f"{name}{half}" for name in ("", "kvfold-demo/") for half in ("calibration", "heldout")]
TEXTS = ("text.txt", "wikitext2-calibration.txt", "wikitext2-evaluation.txt", *(f"{half}/0.py" for half in HALVES))
ELSEWHERE = (r"(Salesforce/wikitext|HuggingFaceFW/fineweb-edu):\S+", "text.txt"), (r"--tasks \S+ --limit \d+", "")
"""What needs the Hub, and what stands for it here."""
TINY = ((r"--kv-rank \d+ --rope-dim \d+", "--kv-rank 24 --rope-dim 8"),)
SHORT = {
    "convert": "--window 64 --calibration-tokens 512 --heal-batch-tokens 128 --overwrite",
    "evaluate": "--window 64 --max-tokens 512",
    "uptrain": "tokens=1024 window=64 eval_tokens=256 batch=2 micro_batch=2 learning_rate=0.003 --overwrite",
    "push": "--dry-run",
    "gguf": "--pre gpt-2",
}
"""What is put behind a verb of the pages, so that a tiny model does for a large one."""


def typed(page: str) -> list[str]:
    """The commands of a page that need no GPU, in their order and cut short."""
    lines = [line.partition("#")[0].strip() for block in BLOCKS.findall(page) for line in block.splitlines()]
    commands = []
    for line in lines:
        for said, here in (*ELSEWHERE, *TINY):
            line = re.sub(said, here, line)
        verb = line.split()[1] if line.startswith("kvfold ") else None
        if verb is None:
            continue
        line += " " + SHORT.get(verb, "")
        line += " --heal-steps 2" if verb == "convert" and "--heal-steps 0" not in line else ""
        line += " --quick" if verb == "evaluate" and "--damage-only" not in line else ""
        commands.append(line)
    return commands


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model under the name of every source that the pages name, and their texts."""
    desk = tmp_path_factory.mktemp("desk")
    others = {"qwen2.5-coder-0.5b": "qwen2", "gemma3-270m": "gemma3_text"}
    for name in (*LLAMAS, *others):
        kind = others.get(name, "llama")
        folder = save_model(desk / name, kind, torch.bfloat16, vocab_size=258, max_position_embeddings=2048)
        save_tokenizer(folder)
        (folder / "README.md").write_text("---\nlicense: llama2\n---\n")
    words = random.Random(0).choices(["fold", "the", "cache", "of", "a", "model", "into", "less"], k=2000)
    for name in TEXTS:
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_text(" ".join(words))
    tokens = desk / "stories260k" / "tokens.safetensors"
    save_tokens(tokens, rows=16, length=64, vocab=258)
    save_file({name: load_file(tokens)["calibration"] for name in ("calibration", "evaluation")}, tokens)
    return desk


def test_every_command_that_they_show_runs(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tiny models, page by page; what one page makes, the next may use."""
    monkeypatch.chdir(desk)
    made = invoke("convert", LLAMAS[0], "llama-gqa8", "--to", "gqa", "--kv-heads", 2, "--method", "mean")
    assert made[0] == 0, made[1]
    ran = 0
    for page, text in PAGES.items():
        for line in typed(text):
            code, told = invoke(*shlex.split(line)[1:])
            assert code == 0, f"{page}: {line}\n{told}"
            ran += 1
    assert ran > 20


def test_every_flag_that_they_name_exists() -> None:
    ours = re.sub(r"accelerate launch .*?-m\s+kvfold", "kvfold", TEXT, flags=re.DOTALL)
    ours = re.sub(r"(python benchmarks/|python -m vllm|llama-quantize )[^`\n]*", "", ours)  # they have flags of their own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    helps = ""
    for verb in ("plan", "convert", "evaluate", "uptrain", "gguf", "push", "demo"):
        command = [sys.executable, "-m", "kvfold", verb, "--help"]
        wide = {**os.environ, "COLUMNS": "200"}
        helps += subprocess.run(command, capture_output=True, text=True, check=True, env=wide).stdout
    assert named <= set(re.findall(r"--[a-z][a-z-]+", helps))


def test_every_make_target_that_they_name_exists() -> None:
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", TEXT, flags=re.MULTILINE))
    targets = {first or second for first, second in named}
    assert {"demo", "test", "engines"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("page", [*PAGES, Path("CONTRIBUTING.md")], ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file of the repository, and to a heading of it."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        slugs = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in headings(file)}
        assert not heading or heading in slugs, target


def headings(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.startswith("#")] if file.suffix == ".md" else []
