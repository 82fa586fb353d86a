from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gradguide import Alignment, GradGuide, SourceGradient
from gradguide.rules.alignment import conflicts, pull


def source(*, moving: bool = False) -> SourceGradient:
    one = {"w": torch.ones(2)}
    return SourceGradient(one, fisher=one, anchor=one) if moving else SourceGradient(one)


def test_the_pull_adds_each_source_at_its_weight_where_there_is_a_gradient() -> None:
    gradient = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]])
    pulled = pull(gradient, torch.tensor([2.0, 0.0]), 2, [3.0, 0.25])
    assert torch.equal(pulled, torch.tensor([[1.0, 0.0, 3.0, 0.25], [1.0, 0.5, 0.0, 0.0]]))
    assert torch.equal(gradient[0], torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_the_weight_of_a_pull_is_not_rounded() -> None:
    gradient = torch.zeros(1, 3, dtype=torch.float64)
    assert pull(gradient, torch.ones(1, dtype=torch.float64), 2, [0.3])[0, 2] == 0.3


def test_each_source_says_its_weight_unless_one_is_given() -> None:
    sources = [source(), source(moving=True), source(moving=True).anchored()]
    assert Alignment(sources).weights == (0.0, 0.0, 1.0)
    assert Alignment(sources, weight=0.5).weights == (0.5, 0.5, 0.5)
    assert Alignment(sources[2], weight=0.0).weights == (0.0,)
    assert Alignment(sources[2]).sources == (sources[2],)


def test_anchored_sources_alone_are_not_projected_on() -> None:
    """A step away from an anchor always conflicts with it."""
    plain, anchored = source(moving=True), source(moving=True).anchored()
    assert Alignment(plain).projected == 1
    assert Alignment([anchored, anchored]).projected == 0
    assert Alignment([anchored, plain], project=True).projected == 2
    assert Alignment(plain, project=False).projected == 0


def test_of_mixed_sources_the_hard_part_acts_for_those_that_are_not_anchored() -> None:
    plain, anchored = source(moving=True), source(moving=True).anchored()
    mixed = Alignment([anchored, plain, anchored], weight=[1.0, 2.0, 3.0])
    assert mixed.projected == 1
    assert mixed.sources == (plain, anchored, anchored)
    assert (mixed.names, mixed.weights) == (("1", "0", "2"), (2.0, 1.0, 3.0))
    assert Alignment({"a": anchored, "b": plain}).names == ("b", "a")
    assert Alignment([anchored, plain], project=True).names == ("0", "1")


def test_an_anchor_beside_a_projecting_source_lets_the_model_move_on() -> None:
    """The gradient of the pull points away from the anchor, so a projection on it would block all movement."""
    moved = {}
    for alone in (True, False):
        parameter = nn.Parameter(torch.zeros(2))
        anchor = SourceGradient(None, fisher={"p": torch.ones(2)}, anchor={"p": torch.zeros(2)})
        other = SourceGradient({"p": torch.tensor([0.0, -1.0])})
        given = anchor if alone else [anchor, other]
        optimizer = GradGuide(
            SGD([parameter], lr=0.1), direction=None, magnitude=None, alignment=Alignment(given, weight=0.01),
            names={"p": parameter},
        )  # fmt: skip
        for _ in range(5):
            parameter.grad = torch.tensor([-1.0, 0.0])
            optimizer.step()
        moved[alone] = float(parameter[0].detach())
    assert moved[True] > 0.4
    assert moved[False] == pytest.approx(moved[True], rel=0.05)


def test_lists_and_mappings_are_copied() -> None:
    """An optimizer has matched what they held: other numbers of sources or weights would not fit it."""
    listed, named, weights = [source(), source()], {"a": source(), "b": source()}, [1.0, 2.0]
    first, second = Alignment(listed, weight=weights), Alignment(named, weight=weights)
    listed.pop(0)
    del named["a"]
    weights[:] = [3.0]
    assert (len(first.sources), first.names, first.weights) == (2, ("0", "1"), (1.0, 2.0))
    assert (len(second.sources), second.names, second.weights) == (2, ("a", "b"), (1.0, 2.0))


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
