"""Nearly opposite sources: what is left of a conflict after rows were combined in float32."""

from __future__ import annotations

import pytest
import torch

from gradguide import Alignment, GradGuide, SourceGradient


@pytest.mark.parametrize("size", [3, 45, 1000])
@pytest.mark.parametrize("tilt", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_nearly_opposite_sources_leave_little_of_a_conflict(size: int, tilt: float) -> None:
    generator = torch.Generator().manual_seed(size)
    source, other, received = torch.randn(3, size, generator=generator)
    sources = [source, -0.3 * (source + tilt * other)]
    parameter = torch.nn.Parameter(torch.zeros(size))
    parameter.grad = received.clone()
    alignment = Alignment([SourceGradient({"p": s}) for s in sources], on="gradient")
    optimizer = GradGuide(
        torch.optim.SGD([parameter], lr=1.0),
        direction=None,
        magnitude=None,
        alignment=alignment,
        names={"p": parameter},
    )
    optimizer.step()
    guided = parameter.grad.double()
    for s in sources:
        conflict = float(guided @ s.double()) / float(s.double().norm() * received.double().norm())
        assert conflict > -2e-2  # rows are combined in float32, with multipliers of up to 1e6
