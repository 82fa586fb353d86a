"""Create sources from tensors: their gradients, and invalid input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradguide import Alignment, SourceGradient
from gradguide.sources.protocol import Source


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
    with pytest.raises(ValueError, match="shorter"):
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
    held = fisher.abs().sqrt() / fisher.abs().sqrt().mean() / anchor.norm()
    torch.testing.assert_close(pull.row(["w"], [theta]).value(0, torch.float32), held * (theta - anchor))
    assert torch.equal(pull.row(["w"], [anchor]).value(0, torch.float32), torch.zeros(5))
    assert pull.names() == ["w"] and pull.shapes() == source.shapes()
    assert pull.metadata == source.metadata | {"anchored": True}
    assert pull.anchored() is pull and pull.weight == 1.0 and source.weight == 0.0
    pull.save(tmp_path / "s.safetensors")
    loaded = SourceGradient.load(tmp_path / "s.safetensors")
    again = [each.row(["w"], [theta]).value(0, torch.float32) for each in (loaded, pull)]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match="needs a source with curvature"):
        SourceGradient({"w": s0}).anchored()


def anchored(fisher: dict[str, Tensor], anchor: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return H of the anchored source, by name."""
    pull = SourceGradient({n: torch.zeros_like(f) for n, f in fisher.items()}, fisher=fisher, anchor=anchor).anchored()
    assert all(torch.equal(pull.anchor[name], place) for name, place in anchor.items())
    return pull.fisher


@pytest.mark.parametrize("sure", [1.0, 1e-8, 1e-24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_how_firmly_an_anchor_holds_does_not_depend_on_how_sure_the_source_is(sure: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    fisher = {name: torch.rand(size, generator=generator) for name, size in (("a", 300), ("b", 50))}
    anchor = {name: torch.randn(table.shape, generator=generator) for name, table in fisher.items()}
    plain = anchored(fisher, anchor)
    scaled = anchored({name: (sure * table).to(dtype) for name, table in fisher.items()}, anchor)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for name, held in plain.items():
        assert scaled[name].dtype == dtype
        torch.testing.assert_close(scaled[name].float(), held, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("numbers", [8, 8000])
def test_parameters_that_moved_by_their_length_are_pulled_with_length_one(numbers: int) -> None:
    """If F is uniform or zero, H is uniform, and its pull does not depend on the model size."""
    anchor = {"w": 3.0 * torch.randn(numbers, generator=torch.Generator().manual_seed(0))}
    length = float(anchor["w"].norm())
    for fisher in (torch.zeros(numbers), torch.full((numbers,), 1e-9)):
        pull = anchored({"w": fisher}, anchor)["w"] * anchor["w"]
        assert float(pull.norm()) == pytest.approx(1.0, rel=1e-5)
        assert torch.allclose(pull * length, anchor["w"], rtol=1e-5)


def test_an_anchor_at_zero_counts_as_a_hundredth_in_root_mean_square() -> None:
    held = anchored({"w": torch.ones(25)}, {"w": torch.zeros(25)})["w"]
    torch.testing.assert_close(held, torch.full((25,), 1.0 / (0.01 * 5.0)))


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


def test_a_source_without_numbers_can_be_anchored() -> None:
    empty = {"p": torch.zeros(0)}
    held = SourceGradient(empty, fisher=empty, anchor=empty).anchored()
    assert held.fisher["p"].shape == (0,)
