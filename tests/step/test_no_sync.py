"""A step of the portable backend reads no value on the host: each read would synchronize with the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.base_checks import has_no_rate, is_step_on_zeros, resting_groups
from gradguide.step import nonfinite as finite


class HostReads(TorchDispatchMode):
    """Counts operations that transfer a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("on", ["update", "gradient"])
def test_a_step_reads_nothing(scope: str, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradguide.ops.foreach._on_cpu", lambda device: False)
    monkeypatch.setattr(finite, "uses_found_inf", lambda measured, base, policy: True)  # as with a fused base on CUDA
    model = nn.Linear(4, 3)
    named = dict(model.named_parameters())
    tables = ({name: torch.rand_like(p) for name, p in named.items()} for _ in range(3))
    source = SourceGradient(next(tables), fisher=next(tables), anchor=next(tables))
    optimizer = GradGuide(
        torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
        direction=Direction(),
        alignment=Alignment(source, on=on, weight=0.5),
        magnitude=Magnitude(),
        scope=scope,
        names=named,
        backend="foreach",
    )
    for _ in range(3):
        model(torch.randn(8, 4)).square().mean().backward()
        with HostReads() as reads:
            optimizer.step()
        assert reads.count == 0
    with HostReads() as reads:
        optimizer.metrics()
    assert reads.count <= 1
    with HostReads() as reads:
        float(torch.ones(()))
    assert reads.count == 1


def test_a_rate_on_an_accelerator_is_not_read() -> None:
    """The meta device stands for CUDA, where a read would also end the capture of a graph."""
    model = nn.Linear(4, 3)
    base = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert is_step_on_zeros(base)
    base.param_groups[0]["lr"] = torch.zeros((), device="meta")
    assert not has_no_rate(base)
    assert not is_step_on_zeros(base)
    assert resting_groups(base) == set()
