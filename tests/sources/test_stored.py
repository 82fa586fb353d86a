"""Sources put together by hand: what they answer, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradguide import Alignment, SourceGradient
from gradguide.sources.source import Source


def table(*shapes: tuple[int, ...], fill: float = 1.0) -> dict[str, Tensor]:
    return {f"p{i}": torch.full(shape, fill) for i, shape in enumerate(shapes)}


def test_is_a_source() -> None:
    source = SourceGradient(table((2, 3)))
    assert isinstance(source, Source)
    assert Alignment(source).sources == (source,)


def test_fixed_answer_is_the_gradient_wherever_it_is_asked() -> None:
    gradient = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    row = SourceGradient(gradient).row(["b", "a"], [torch.randn(4), torch.randn(2, 3)])
    assert torch.equal(row.value(0, torch.float32), gradient["b"])
    assert torch.equal(row.value(1, torch.float32), gradient["a"].flatten())


def test_moving_answer_by_hand() -> None:
    source = SourceGradient(
        {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[0.5]])},
        fisher={"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([[4.0]])},
        anchor={"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[0.0]])},
    )
    assert source.curvature
    row = source.row(["b", "a"], [torch.tensor([[0.25]]), torch.tensor([4.0, 7.0])])
    assert row.value(0, torch.float64).tolist() == [1.5]
    assert row.value(1, torch.float64).tolist() == [7.0, -2.0]


def test_names_and_shapes_keep_the_order() -> None:
    source = SourceGradient({"z": torch.zeros(1), "a": torch.zeros(2, 2), "m": torch.zeros(())})
    assert source.names() == ["z", "a", "m"]
    assert source.shapes() == {"z": (1,), "a": (2, 2), "m": ()}
    assert not source.curvature


def test_row_of_an_unknown_name_or_a_list_of_another_length() -> None:
    source = SourceGradient(table((2,)))
    with pytest.raises(KeyError, match="other"):
        source.row(["other"], [torch.zeros(2)])
    with pytest.raises(ValueError, match="as many, found 1 and 0"):
        source.row(["p0"], [])


def test_tables_given_are_copied_not_kept() -> None:
    gradient = table((2,))
    source = SourceGradient(gradient)
    gradient["extra"] = torch.zeros(1)
    assert source.names() == ["p0"]


def test_repr() -> None:
    assert repr(SourceGradient(table((2, 3), (4,)))) == "SourceGradient(2 tensors, 10 numbers, fixed)"
    one = table((2,))
    assert repr(SourceGradient(one, fisher=one, anchor=one)) == "SourceGradient(1 tensors, 2 numbers, moving)"


def test_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        SourceGradient({})


def test_half_of_the_curvature() -> None:
    one = table((2,))
    with pytest.raises(ValueError, match="both fisher and anchor, or neither"):
        SourceGradient(one, fisher=one)
    with pytest.raises(ValueError, match="both fisher and anchor, or neither"):
        SourceGradient(one, anchor=one)


@pytest.mark.parametrize("wrong", [table((3,)), table((2,), (2,)), {"q": torch.ones(2)}, {}])
def test_names_or_shapes_that_differ(wrong: dict[str, Tensor]) -> None:
    one = table((2,))
    with pytest.raises(ValueError, match="fisher must have the names and shapes"):
        SourceGradient(one, fisher=wrong, anchor=one)
    with pytest.raises(ValueError, match="anchor must have the names and shapes"):
        SourceGradient(one, fisher=one, anchor=wrong)


def test_anchored_leaves_out_what_training_left(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    s0, fisher, anchor, theta = torch.randn(4, 5, generator=generator)
    source = SourceGradient({"w": s0}, fisher={"w": fisher.abs()}, anchor={"w": anchor}, metadata={"examples": 3})
    pull = source.anchored()
    assert torch.equal(pull.row(["w"], [theta]).value(0, torch.float32), fisher.abs() * (theta - anchor))
    assert torch.equal(pull.row(["w"], [anchor]).value(0, torch.float32), torch.zeros(5))
    assert pull.names() == ["w"] and pull.shapes() == source.shapes() and pull.metadata == source.metadata
    pull.save(tmp_path / "s.safetensors")
    loaded = SourceGradient.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.row(["w"], [theta]).value(0, torch.float32), fisher.abs() * (theta - anchor))
    with pytest.raises(ValueError, match="needs a source with curvature"):
        SourceGradient({"w": s0}).anchored()


@pytest.mark.parametrize(
    ("table", "tensor", "error", "message"),
    [
        ("gradient", torch.tensor([1.0, torch.nan]), ValueError, "gradient must be finite, found NaN or Inf for w"),
        ("anchor", torch.tensor([1.0, torch.inf]), ValueError, "anchor must be finite"),
        ("fisher", torch.tensor([1.0, -0.5]), ValueError, "fisher must be at least 0, found -0.5 for w"),
        ("gradient", torch.tensor([1, 2]), TypeError, "gradient must hold floating numbers, found torch.int64 for w"),
    ],
)
def test_numbers_that_no_capture_gives_are_refused(
    table: str, tensor: torch.Tensor, error: type[Exception], message: str
) -> None:
    good = {"gradient": torch.ones(2), "fisher": torch.ones(2), "anchor": torch.ones(2)}
    made = {name: {"w": value} for name, value in (good | {table: tensor}).items()}
    with pytest.raises(error, match=message):
        SourceGradient(made["gradient"], fisher=made["fisher"], anchor=made["anchor"])
