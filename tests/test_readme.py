"""What the README and docs/ say can be typed, and leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.recipes.demo.demo import MODEL, write_texts

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
