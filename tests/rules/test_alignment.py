from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradguide import Alignment, SourceGradient
from gradguide.rules.alignment import conflicts, pull


def source(*, moving: bool = False) -> SourceGradient:
    one = {"w": torch.ones(2)}
    return SourceGradient(one, fisher=one, anchor=one) if moving else SourceGradient(one)


def test_the_pull_adds_each_source_at_its_weight_where_there_is_a_gradient() -> None:
    gradient = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]])
    pulled = pull(gradient, torch.tensor([2.0, 0.0]), 2, [3.0, 0.25])
    assert torch.equal(pulled, torch.tensor([[1.0, 0.0, 3.0, 0.25], [1.0, 0.5, 0.0, 0.0]]))
    assert torch.equal(gradient[0], torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_each_source_says_its_weight_unless_one_is_given() -> None:
    sources = [source(), source(moving=True), source(moving=True).anchored()]
    assert Alignment(sources).weights == (0.0, 0.0, 1.0)
    assert Alignment(sources, weight=0.5).weights == (0.5, 0.5, 0.5)
    assert Alignment(sources[2], weight=0.0).weights == (0.0,)
    assert Alignment(sources[2]).sources == (sources[2],)


def test_anchored_sources_alone_are_not_projected_on() -> None:
    """A step away from an anchor always conflicts with it."""
    plain, anchored = source(moving=True), source(moving=True).anchored()
    assert Alignment(plain).projects
    assert Alignment([plain, anchored]).projects
    assert not Alignment([anchored, anchored]).projects
    assert Alignment(anchored, project=True).projects
    assert not Alignment(plain, project=False).projects


def test_conflicts_within_rounding_are_none() -> None:
    cosines: Tensor = torch.tensor([-1.0, -1e-5, -1e-7, 0.0, 1.0])
    assert conflicts(cosines).tolist() == [True, True, False, False, False]


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"weight must be in \[0, inf\), found -1"):
        Alignment(source(), weight=-1)
    with pytest.raises(ValueError, match="on must be one of 'update', 'gradient', found 'loss'"):
        Alignment(source(), on="loss")
    with pytest.raises(TypeError, match="project must be True or False, found 'yes'"):
        Alignment(source(), project="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source must be a SourceGradient or the like, found Tensor"):
        Alignment(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one source, found none"):
        Alignment([])
    with pytest.raises(ValueError, match="at most 16 sources, found 17"):
        Alignment([source()] * 17)
