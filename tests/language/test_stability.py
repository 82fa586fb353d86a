"""Stability of gradients whose answers are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.language.stability import Stability


def _observed(gradients: list[list[float]]) -> dict[str, float | None]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    found = Stability([parameter], [], [])
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        found.observe()
    return found.columns()


def test_gradients_that_agree_are_coherent_whatever_their_length() -> None:
    found = _observed([[3.0, 0.0], [1e-4, 0.0], [50.0, 0.0]])
    assert found["coherence"] == pytest.approx(1.0)
    assert found["successive_cosine"] == pytest.approx(1.0)
    assert found["alignment"] is None


def test_gradients_that_turn_back_are_not() -> None:
    found = _observed([[1.0, 0.0], [-1.0, 0.0]])
    assert found["successive_cosine"] == pytest.approx(-1.0)
    assert found["coherence"] == pytest.approx((1.0 + 0.05 * (1 - 0.95) / (1 - 0.95**2)) / 2, rel=1e-5)


def test_an_update_is_compared_with_the_gradient_of_the_pool() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))

    def pool() -> None:
        parameter.grad = torch.tensor([1.0, 0.0])

    found = Stability([parameter], [pool, pool], [2])
    for step, change in ((1, [0.0, 1.0]), (2, [-1.0, 1.0])):
        found.before(step)
        parameter.data += torch.tensor(change)
        found.after()
    assert found.columns()["alignment"] == pytest.approx(0.5**0.5)
