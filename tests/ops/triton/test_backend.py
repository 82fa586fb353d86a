"""``backend="triton"``: errors if it is not available, and steps that agree with the portable backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradguide import Direction, GradGuide
from gradguide.ops import available, foreach, select
from gradguide.ops import triton as ops
from tests.conformance.bases import BASES, net_for
from tests.contract import kit
from tests.ops.triton.problems import DEVICE

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Simulate a compiled run on a device of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    available.lacks_triton.cache_clear()
    yield monkeypatch
    available.lacks_triton.cache_clear()


def base() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])


def test_auto_takes_what_there_is(compiled: pytest.MonkeyPatch) -> None:
    assert select("auto", CUDA) is ops
    assert select("triton", CUDA) is ops
    assert select("foreach", CUDA) is foreach
    assert select("auto", CPU) is foreach
    assert select("auto", torch.device("mps")) is foreach


def test_parameters_on_the_cpu_are_an_error(compiled: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"'triton' is not available: it runs on CUDA devices, found .*'cpu'"):
        GradGuide(base(), backend="triton", direction=Direction())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch: patch.setitem(sys.modules, "triton", None), "triton is not installed"),
        (
            lambda patch: patch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.2.0")),
            "it needs triton 3.5 or newer, found 3.2.0",
        ),
        (
            lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)),
            "it needs compute capability 8.0 or newer, found 7.5",
        ),
    ],
    ids=["not installed", "too old", "old device"],
)
def test_what_is_missing_is_named_and_auto_does_without(
    compiled: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    change(compiled)
    with pytest.raises(RuntimeError, match=f"backend='triton' is not available: {message}; use backend='auto'"):
        select("triton", CUDA)
    assert select("auto", CUDA) is foreach


def run(backend: str, name: str, kind: str, scope: str, dtype: torch.dtype) -> tuple[Any, ...]:
    model = net_for(name, dtype).to(DEVICE)
    optimizer = kit.guide(model, BASES[name], kind, scope, backend=backend)
    history, guided = [], []
    for step in range(3):
        kit.give_gradients(model, step, scale=3.0)
        optimizer.step()
        history.append(optimizer.metrics())
        guided.append([p.grad.clone().double() for p in model.parameters() if p.grad is not None])
    return history, guided, kit.directions_of(optimizer), [p.double() for p in kit.parameters_of(model)]


@pytest.mark.parametrize(
    ("kind", "scope"),
    [
        ("defaults", "global"),
        ("no source", "global"),
        ("on update", "group"),
        ("on gradient", "tensor"),
        ("two sources", "global"),
    ],
)
def test_steps_agree_with_the_portable_backend(kind: str, scope: str) -> None:
    mine, other = (run(backend, "AdamW foreach", kind, scope, torch.float32) for backend in ("triton", "foreach"))
    for found, expected in zip(mine[0], other[0], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    torch.testing.assert_close(mine[1:], other[1:], rtol=1e-4, atol=1e-5)


def test_steps_agree_in_low_precision() -> None:
    mine, other = (run(backend, "SGD", "on gradient", "global", torch.bfloat16) for backend in ("triton", "foreach"))
    # A different rounding to bfloat16 propagates: allow two units in the last place of numbers near 2.
    torch.testing.assert_close(mine[1:], other[1:], rtol=2e-2, atol=2e-2)
