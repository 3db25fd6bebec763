"""The README's commands run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

from kvfold.recipes.demo.demo import MODEL, write_texts

README = (Path(__file__).parent.parent / "README.md").read_text()
MARK = "<!-- tests/test_readme.py runs this block -->\n```sh\n"


def test_the_block_on_the_demo_runs(tmp_path: Path) -> None:
    """Verbatim but for the environment, which is this one, and for healing and calibration, which are cut short."""
    block = README.split(MARK)[1].split("```")[0]
    lines = [line for line in block.splitlines() if "activate" not in line]
    assert [line.split()[1] for line in lines] == ["plan", "convert", "evaluate"]
    (tmp_path / "kvfold-demo").mkdir()
    (tmp_path / "kvfold-demo" / "source").symlink_to(MODEL)
    write_texts(tmp_path / "kvfold-demo")
    short = {"convert": " --heal-steps 2 --calibration-tokens 4096", "evaluate": " --batch 4 --quick"}
    script = "\n".join(["set -e", *(line + short.get(line.split()[1], "") for line in lines)])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert "25.0% of the source's cache" in ran.stdout
    assert "damage" in ran.stdout
    assert (tmp_path / "my-gqa" / "report.html").exists()


def test_every_flag_that_the_readme_names_exists() -> None:
    ours = re.sub(r"accelerate launch .*?-m\s+kvfold", "kvfold", README, flags=re.DOTALL)
    ours = re.sub(r"(python benchmarks/|llama-quantize )[^`\n]*", "", ours)  # they have flags of their own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    helps = ""
    for verb in ("plan", "convert", "evaluate", "uptrain", "gguf", "push", "demo"):
        command = [sys.executable, "-m", "kvfold", verb, "--help"]
        helps += subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert named <= set(re.findall(r"--[a-z][a-z-]+", helps))


def test_make_targets_that_the_readme_names_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)) & {"demo", "test", "check"}:
        assert f"\n{target}:" in makefile
