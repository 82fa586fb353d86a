"""Imports between the library's folders only go down the layers, so that data flows one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gradguide

PACKAGE = Path(gradguide.__file__).parent

LAYERS = (
    ("__main__", "demo", "cli"),
    ("integrations",),
    ("__init__", "factory", "optim"),
    ("optimizer",),
    ("checkpoint", "wrapper"),
    ("regularizer",),
    ("step",),
    ("rules",),
    ("sources",),
    ("ops",),
    ("base_checks",),
    ("distributed",),
    ("recording",),
    ("utils",),
)
"""From top to bottom. A folder or module may import from its own layer and from those below."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def place(parts: tuple[str, ...]) -> str:
    """Return the folder or top module that a dotted path inside the package belongs to."""
    return parts[0] if parts else "__init__"


def imported(path: Path) -> list[tuple[int, str]]:
    """Return (line, folder or module) of every import from the library, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gradguide":
            inside = tuple(node.module.split(".")[1:])
            names = [place(inside)] if inside else [alias.name for alias in node.names]
            found += [(node.lineno, name if name in LEVEL else "__init__") for name in names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "gradguide":
                    found.append((node.lineno, place(tuple(parts[1:]))))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = place(relative.with_suffix("").parts)
    assert own in LEVEL, f"{own} has no layer: add it to LAYERS"
    upward = [(line, name) for line, name in imported(path) if LEVEL[name] < LEVEL[own]]
    assert upward == [], f"{relative} imports from a higher layer"


def test_few_modules_lie_at_the_top_and_none_is_long() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    long = {str(p.relative_to(PACKAGE)): n for p in MODULES if (n := len(p.read_text("utf-8").splitlines())) > 300}
    assert long == {}


def test_every_folder_says_what_is_in_it() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text, path


def test_every_module_has_tests_under_its_name_or_in_the_table() -> None:
    tests = Path(__file__).parent
    rows = re.findall(r"^\| `(\S+\.py)` \| (.+) \|$", (tests / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    listed = {module: re.findall(r"`(\S+)`", files) for module, files in rows}
    names = [path.relative_to(PACKAGE) for path in MODULES if not path.name.startswith("__")]
    own = {str(name) for name in names if (tests / name.with_name(f"test_{name.name}")).is_file()}
    assert own | listed.keys() == set(map(str, names))
    assert not own & listed.keys()
    assert all((tests / file).is_file() for files in listed.values() for file in files)
