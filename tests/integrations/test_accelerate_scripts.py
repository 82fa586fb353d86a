"""Run Accelerate's checks of training, schedulers and gradient sync with guided optimizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradguide

SCRIPT = """
import math
import sys

import torch.optim as optim

from gradguide import Direction, GradGuide, Magnitude, guided

module, ranks, kind = sys.argv[1:]
# On two ranks test_sync compares gradients after steps that one optimizer makes and the other leaves out, without
# clearing them. A step leaves the guided gradient, so there only rules that leave it as received can pass.
measuring = {"direction": Direction(damping=0.0), "magnitude": Magnitude(max_norm=math.inf)}
for name in ("SGD", "Adam", "AdamW"):
    setattr(optim, name, guided(getattr(optim, name), **(measuring if kind == "measuring" else {})))

from accelerate import debug_launcher
from accelerate.test_utils.scripts import test_script, test_sync

main = {"test_script": test_script.main, "test_sync": test_sync.main}[module]
assert issubclass(test_sync.AdamW, GradGuide)
if ranks == "1":
    main()
else:
    debug_launcher(main, num_processes=int(ranks))
print("all passed")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "ranks", "kind"),
    [("test_sync", 1, "default"), ("test_sync", 2, "measuring"), ("test_script", 1, "default")],
)
def test_i01_accelerates_own_checks_pass(tmp_path: Path, module: str, ranks: int, kind: str) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "checks.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "checks.py", module, str(ranks), kind],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(gradguide.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all passed\n")
