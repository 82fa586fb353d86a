"""Devices without float64 (MPS, some of Intel's GPUs), and systems without Triton, a compiler or POSIX's modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradguide
from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.ops import foreach, tensors
from gradguide.step import metrics

META = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Raise for each tensor in float64 on the meta device, as MPS does. Every gradient is finite."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device == META and tensor.dtype == torch.float64:
                raise TypeError(f"{func} makes a tensor in float64 on a device that has none")
        return found


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the meta device stand for one without float64."""
    monkeypatch.setattr(tensors, "_has_float64", lambda device: device != META)
    monkeypatch.setattr("gradguide.ops.select", lambda backend, device: foreach)


@pytest.mark.parametrize(
    ("options", "on"),
    [
        ({}, None),
        ({}, "gradient"),
        ({}, "update"),
        ({"direction": None}, None),
        ({"direction": Direction(share_momentum=True)}, "update"),
        ({"scope": "tensor"}, "update"),
    ],
    ids=["default", "gradient", "update", "no direction", "shared momentum", "scopes"],
)
def test_a_step_and_its_metrics_need_no_float64(narrow: None, options: dict[str, Any], on: Any) -> None:
    source = SourceGradient({"weight": torch.ones(3, 4), "bias": torch.ones(3)})
    with NoFloat64():  # type: ignore[no-untyped-call]
        model = nn.Linear(4, 3, device=META)
        alignment = None if on is None else Alignment(source, on=on, weight=0.5, project=True)
        base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = GradGuide(base, alignment=alignment, names=model, **({"direction": Direction()} | options))
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        record = optimizer._progress.last
        assert record is not None
        measures = metrics._measures(record, optimizer._engine.update_norm(META), 0 if on is None else 1)
    assert measures.device == META
    assert measures.dtype == torch.float32
    assert optimizer._progress.totals.dtype == torch.float32


def test_float64_is_for_devices_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {0: True, 1: False}
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has[device.index]))
    tensors._has_float64.cache_clear()
    found = {name: tensors.wide_dtype(torch.device(name)) for name in ("cpu", "cuda", "mps", "xpu:0", "xpu:1")}
    tensors._has_float64.cache_clear()
    wide, narrow = torch.float64, torch.float32
    assert found == {"cpu": wide, "cuda": wide, "mps": narrow, "xpu:0": wide, "xpu:1": narrow}


SCRIPT = """
import importlib, os, pkgutil, signal, sys
import safetensors.torch, torch, tqdm.auto

# What torch and others import is theirs.
parameter = torch.nn.Parameter(torch.ones(2))
parameter.grad = torch.ones(2)
torch.optim.AdamW([parameter]).step()

BLOCKED = ("triton", "torch._inductor", "setuptools")
if sys.argv[1] == "windows":
    BLOCKED += ("fcntl", "resource", "termios", "pwd")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in BLOCKED):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

before = {name for name in sys.modules if name.startswith(BLOCKED)}
for name in before:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
if sys.argv[1] == "windows":
    sys.platform = "win32"
    tqdm.std._screen_shape_wrapper = lambda: lambda file: (80, 24)  # that of Windows asks Windows
    for module, names in (
        (os, ("fork", "getuid", "geteuid", "fchmod", "fchown", "chown", "mkfifo", "kill", "sysconf", "O_NOFOLLOW")),
        (signal, ("SIGPIPE", "SIGHUP", "SIGKILL", "SIGALRM", "alarm", "pthread_kill")),
    ):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)

import gradguide
from gradguide import *

for found in pkgutil.walk_packages(gradguide.__path__, "gradguide."):
    if "triton" not in found.name and not found.name.startswith(("gradguide.integrations", "gradguide.__main__")):
        importlib.import_module(found.name)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
batches = [(torch.randn(2, 4), torch.randint(3, (2,))) for _ in range(4)]
loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
stored = SourceGradient.capture(model, batches, loss)
for _ in range(2):  # the second replaces the file
    stored.save("stored.safetensors")
structured = StructuredSource.capture(model, batches, loss, rank=None)
structured.save("structured.safetensors")
sources = [SourceGradient.load("stored.safetensors").anchored(), StructuredSource.load("structured.safetensors")]
optimizer = GradGuide(torch.optim.AdamW(model.parameters(), lr=1e-2), alignment=Alignment(sources), names=model)
history = History()
optimizer.record(history)
for batch in batches:
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()
history.save("history.csv")
assert len(History.load("history.csv")) == 4
try:
    GradGuide(torch.optim.AdamW(model.parameters()), backend="triton")
except RuntimeError as error:
    print(error)
from gradguide.cli.main import main
assert main(["inspect", "structured.safetensors", "--json"]) == 0
assert not [name for name in sys.modules if name.startswith(BLOCKED)]
print(sorted(os.listdir()))
"""


@pytest.mark.parametrize("system", [pytest.param("linux", marks=pytest.mark.slow), "windows"])
def test_without_triton_a_compiler_or_posix_modules_everything_else_works(tmp_path: Path, system: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", SCRIPT, system],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(gradguide.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "backend='triton' is not available: triton is not installed; use backend='auto'" in done.stdout
    assert done.stdout.splitlines()[-1] == "['history.csv', 'stored.safetensors', 'structured.safetensors']"
