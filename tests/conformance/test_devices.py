"""A model on several devices: coefficients are copied to the device that uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.ops import Row, Write
from gradguide.ops.tensors import all_finite


class OneDevice:
    """Ops without computation, which check that all arguments are on one device. The second device is "meta"."""

    def __init__(self) -> None:
        self.written: list[torch.device] = []

    def gram(self, rows: Sequence[Row | None]) -> Tensor:
        assert len({tensor.device for row in rows if row is not None for part in row.parts for tensor in part}) == 1
        return torch.eye(len(rows), dtype=torch.float64).unsqueeze(0)  # on the CPU, like a copy from the device

    def combine_(self, rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
        for write in writes:
            assert write.coefficients.device == write.into[0].device
            self.written.append(write.coefficients.device)


@pytest.mark.parametrize("on", ["gradient", "update"])
def test_coefficients_go_to_the_device_of_what_they_write(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = OneDevice()
    monkeypatch.setattr("gradguide.ops.select", lambda backend, device: ops)
    held = {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(3, device="meta"))}
    source = SourceGradient({name: torch.ones(3) for name in held})
    optimizer = GradGuide(
        SGD(held.values(), lr=0.1),
        names=held.items(),
        alignment=Alignment(source, on=on, weight=0.5),
        direction=Direction(),
    )
    for parameter in held.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert {device.type for device in ops.written} == {"cpu", "meta"}


def test_gradients_on_several_devices_are_checked_on_the_first() -> None:
    """Capture of a model with ``device_map="auto"`` over two GPUs raised, as did a ``ReplaySource``."""
    with FakeTensorMode():
        found = all_finite([torch.ones(3, device=device) for device in ("cuda:0", "cuda:1")])
    assert found.device == torch.device("cuda:0")
    for number in (math.nan, math.inf, 1.0):
        assert bool(all_finite([torch.ones(3), torch.tensor([number])])) == math.isfinite(number)
