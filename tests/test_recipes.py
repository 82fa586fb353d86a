"""Every recipe of the README, run as a user would: copied into an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
RECIPES = dict(re.findall(r"```python\n# recipe: (\S+)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
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
    assert set(RECIPES) == {"trainer.py", "accelerate_loop.py", "lightning_module.py", "amp.py", "fsdp.py"}
