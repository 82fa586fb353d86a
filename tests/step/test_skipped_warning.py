"""Five skipped steps in a row give one warning, which names the first parameter with a NaN."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from gradguide import Alignment, GradGuide, SourceGradient
from tests.contract import kit


def steps(model: nn.Module, optimizer: GradGuide, kinds: str) -> list[str]:
    """Run steps with good (g) and bad (b) gradients, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind in kinds:
            kit.give_gradients(model, 1)
            if kind == "b":
                for index in (1, 3):
                    gradient = list(model.parameters())[index].grad
                    assert gradient is not None
                    gradient[0] = float("nan")
            optimizer.step()
    assert all(entry.category is UserWarning for entry in caught)
    return [str(entry.message) for entry in caught]


def test_it_comes_once_in_a_run_of_skipped_steps() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    assert steps(model, optimizer, "bbbbgbbbb") == []
    (message,) = steps(model, optimizer, "bbbbb")
    assert "the last 5 steps were skipped: the gradient of 0.bias and 1 more has NaN or Inf" in message
    assert len(steps(model, optimizer, "gbbbbbb")) == 1
    assert optimizer.metrics()["skipped"] == 19


def test_a_copy_counts_on() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    assert steps(model, optimizer, "bbbb") == []
    both = copy.deepcopy((model, optimizer))
    assert len(steps(*both, "b")) == 1


def test_a_source_that_is_not_finite_is_named_as_such() -> None:
    parameter = nn.Parameter(torch.ones(2))
    source = SourceGradient(None, fisher={"p": torch.full((2,), 3e38)}, anchor={"p": torch.full((2,), -1e5)})
    optimizer = GradGuide(
        torch.optim.SGD([parameter], lr=0.1), alignment=Alignment(source, weight=1.0), names={"p": parameter}
    )
    with pytest.warns(UserWarning, match="skipped: the source gradient at the present parameters has NaN or Inf"):
        for _ in range(5):
            parameter.grad = torch.ones(2)
            optimizer.step()
