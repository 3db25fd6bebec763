"""The house: what is installed, what imports what, and how fast it answers."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PARTS = ("convert", "surgery", "evaluation", "recipes", "serving")


def test_the_package_is_found_without_being_installed() -> None:
    """As an editor or a type checker finds it: by plain folders and links below src."""
    for part in PARTS:
        assert (ROOT / "src/kvfold" / part).resolve() == ROOT / part
    script = "import kvfold.convert.planning.plan, kvfold.recipes.recipe; print(kvfold.convert.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, env=environment, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert Path(ran.stdout.strip()) == ROOT / "src/kvfold/convert/__init__.py"


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("surgery", {"surgery"}),
        ("convert", {"convert", "surgery", "errors"}),
        ("evaluation", {"evaluation", "convert", "surgery", "errors"}),
        ("serving", {"serving", "convert", "surgery"}),
        ("recipes", {"recipes", "evaluation", "convert", "surgery", "errors"}),
    ],
)
def test_imports_point_one_way(part: str, allowed: set[str]) -> None:
    for path in (ROOT / part).rglob("*.py"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("kvfold.")}
        assert ours <= allowed, path
        if part == "surgery":
            outside = {name.split(".")[0] for name in imports(path)} - {"kvfold"} - set(sys.stdlib_module_names)
            assert outside <= {"torch"}, path


def test_help_is_quick_and_version_is_told() -> None:
    """In seconds of CPU, which a busy machine does not change much."""
    times = []
    for _ in range(5):
        before = os.times()
        result = subprocess.run([sys.executable, "-m", "kvfold", "--help"], capture_output=True, text=True, check=True)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    verbs = ("plan", "convert", "evaluate", "uptrain", "recipes", "push", "gguf", "demo")
    assert all(verb in result.stdout for verb in verbs)
    assert min(times) < 0.5
    version = subprocess.run([sys.executable, "-m", "kvfold", "--version"], capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version.stdout == f"kvfold {project['version']}\n"


def test_public_names_resolve() -> None:
    import kvfold

    for name in kvfold.__all__:
        assert getattr(kvfold, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvfold.nothing  # noqa: B018


@pytest.mark.parametrize("by", ["wheel", "sdist"])
def test_what_is_installed_holds_all_of_it(tmp_path: Path, by: str) -> None:
    """Built from a clean copy, with its links, at once or from a source distribution: every module and the demo model."""
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "kvfold-demo", "__pycache__", "tests")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out, symlinks=True)
    origin = tmp_path / "copy"
    if by == "sdist":
        build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
        subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=origin, check=True, capture_output=True)
        (origin,) = tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(origin)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for part in PARTS:
        for path in (ROOT / part).rglob("*.py"):
            assert f"kvfold/{part}/{path.relative_to(ROOT / part)}" in names
    assert {"kvfold/cli.py", "kvfold/py.typed", "kvfold/recipes/demo/model/model.safetensors"} <= names
    assert {"kvfold/convert/publishing/card.md.jinja", "kvfold/evaluation/report.html.jinja"} <= names
    assert {"kvfold/recipes/configs/distill-lora.yaml", "kvfold/recipes/accelerate/uptrain.sbatch"} <= names
