"""A step of the portable backend reads no value on the host: each read would synchronize with the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
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
