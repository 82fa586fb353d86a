"""Guided gradients beyond the range of their dtype (row 19)."""

from __future__ import annotations

import pytest
import torch

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from tests.contract.backends import BACKENDS

CASES = [
    *((backend, torch.float16) for backend in BACKENDS),
    # Squares of numbers beyond 1e19 overflow in the kernels, which skips the step.
    *(("foreach", dtype) for dtype in (torch.bfloat16, torch.float32)),
]


def guided(received: torch.Tensor, source: torch.Tensor, backend: str, **options: object) -> GradGuide:
    parameter = torch.nn.Parameter(torch.zeros_like(received))
    parameter.grad = received.clone()
    optimizer = GradGuide(
        torch.optim.SGD([parameter], lr=1e-3),
        alignment=Alignment(SourceGradient({"p": source}), weight=10.0, project=False),
        names={"p": parameter}, backend=backend, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("magnitude", [None, Magnitude(max_norm=1e300, max_update=None)])
@pytest.mark.parametrize("share", [0.25, 0.9])
def test_i19_a_gradient_that_its_dtype_cannot_hold_is_scaled_down(
    backend: str, dtype: torch.dtype, magnitude: Magnitude | None, share: float
) -> None:
    largest = share * torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(0)
    received = (torch.rand(5, 3, generator=generator) * largest).to(dtype)
    source = (torch.rand(5, 3, generator=generator) - 0.5).float() * min(largest, 3e37)
    optimizer = guided(received, source, backend, direction=None, magnitude=magnitude)
    (parameter,) = optimizer.param_groups[0]["params"]
    exact = received.double() + 10.0 * source.double()
    metrics = optimizer.metrics()
    assert parameter.grad.isfinite().all()
    assert parameter.isfinite().all()
    assert metrics["skipped"] == 0
    if exact.abs().max() > torch.finfo(dtype).max:
        assert metrics["clip_factor"] < 1
    tolerance = 4 * torch.finfo(dtype).eps * exact.abs().max() * metrics["clip_factor"]
    difference = parameter.grad.double() - metrics["clip_factor"] * exact
    assert difference.abs().max() <= tolerance


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_i19_a_large_gradient_that_no_rule_changes_keeps_its_bits(backend: str, dtype: torch.dtype) -> None:
    """Its length is beyond the range of the dtype, its elements are not."""
    received = torch.full((60, 50), torch.finfo(dtype).max, dtype=dtype)
    optimizer = guided(received, torch.zeros(60, 50), backend, direction=Direction(), magnitude=None)
    (parameter,) = optimizer.param_groups[0]["params"]
    assert torch.allclose(parameter.grad.double(), received.double(), rtol=2e-6)
    assert optimizer.metrics()["skipped"] == 0
