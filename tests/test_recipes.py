"""Copy every recipe of the README and the integrations' docstrings into an empty folder and run it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _recipes() -> dict[str, str]:
    """Return each recipe by the name of its file."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"```python\n# recipe: (\S+)\n(.*?)```", text, flags=re.DOTALL))
    for path in (ROOT / "gradguide" / "integrations").glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        blocks = re.findall(r"^    # recipe: (\S+)\n((?:    .*\n|\n)*(?:    .*)?)", docstring, flags=re.MULTILINE)
        found |= {name: textwrap.dedent(code) for name, code in blocks}
    return found


RECIPES = _recipes()
FRAMEWORKS = {name for name in RECIPES if name.startswith("guided_")}
"""Tried by tests/integrations/test_frameworks.py, where the framework is installed."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - FRAMEWORKS))
def test_a_recipe_runs_as_it_stands(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(RECIPES[name], encoding="utf-8")
    launch = [sys.executable, name]
    if name == "fsdp.py":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\d", done.stdout), done.stdout


def test_there_is_a_recipe_for_every_stack() -> None:
    scripts = {"trainer.py", "accelerate_loop.py", "lightning_module.py", "amp.py", "fsdp.py", "dpo.py"}
    plugins = {f"guided_{name}.py" for name in ("axolotl", "llamafactory", "swift", "torchtitan")}
    assert set(RECIPES) == scripts | plugins
    for name, code in RECIPES.items():
        compile(code, name, "exec")
