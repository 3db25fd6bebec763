"""The house: what is installed, what imports what, and how fast it answers."""

import ast
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
HOUSE = {"kvfold": "src/kvfold", **{f"kvfold.{part}": part for part in ("convert", "surgery", "evaluation", "recipes")}}


def test_every_package_is_listed_for_installation() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {}
    for name, folder in HOUSE.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            nested = init.parent.relative_to(ROOT / folder).parts
            found[".".join((name, *nested))] = "/".join((folder, *nested))
    assert sorted(settings["packages"]) == sorted(found)
    assert settings["package-dir"] == found


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
    times = []
    for _ in range(5):
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "kvfold", "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
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


def test_the_wheel_holds_all_of_it(tmp_path: Path) -> None:
    """Built from a clean copy: every module and the demo model are inside."""
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "kvfold-demo", "__pycache__", "tests")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, cwd=tmp_path / "copy", check=True, capture_output=True)
    (wheel,) = (tmp_path / "copy").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name, folder in HOUSE.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{name.replace('.', '/')}/{path.relative_to(ROOT / folder)}" in names
    assert {"kvfold/py.typed", "kvfold/recipes/demo/model/model.safetensors"} <= names
    assert {"kvfold/convert/card.md.jinja", "kvfold/evaluation/report.html.jinja"} <= names
    assert {"kvfold/recipes/configs/distill-lora.yaml", "kvfold/recipes/accelerate/uptrain.sbatch"} <= names
