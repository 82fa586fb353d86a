"""Match sources with optimizers: lists of mismatches, and names changed by wrappers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.sources.matching import match_sources
from gradguide.utils.names import Names

from .problems import mean_square


def source_of(*names: str, shape: tuple[int, ...] = (2,)) -> SourceGradient:
    return SourceGradient({name: torch.ones(shape) for name in names})


def parameters(*names: str, shape: tuple[int, ...] = (2,)) -> dict[Tensor, str]:
    return {nn.Parameter(torch.zeros(shape)): name for name in names}


def error(sources: list[SourceGradient], names: dict[Tensor, str]) -> str:
    with pytest.raises(ValueError) as caught:
        match_sources(sources, [{"params": list(names)}], Names(names))
    return str(caught.value)


def test_exact_match_in_any_order_and_over_groups() -> None:
    names = parameters("a", "b", "c")
    a, b, c = names
    match_sources([source_of("c", "a", "b")], [{"params": [a]}, {"params": [b, c]}], Names(names))


def test_no_names() -> None:
    assert "pass names=model" in error([source_of("a")], {})


def test_missing() -> None:
    message = error([source_of("a")], parameters("a", "b", "c"))
    assert "2 missing from the source (b, c)" in message
    assert "unexpected" not in message.split(". It was")[0]
    assert "another shape" not in message


def test_unexpected() -> None:
    message = error([source_of("a", "z", "y")], parameters("a"))
    assert "2 unexpected in the source (z, y)" in message
    assert "missing" not in message


def test_another_shape() -> None:
    message = error([source_of("a", shape=(8, 4))], parameters("a", shape=(16, 4)))
    assert "1 of another shape (a (8, 4) for (16, 4))" in message
    assert "missing" not in message


def test_weight_and_bias_of_other_libraries_are_no_adapters() -> None:
    """torchtune has no adapter after ``lora_a``, so the message spoke of an adapter called 'weight'."""
    message = error([source_of("q.lora_a.weight")], parameters("q.lora_a.weight", "q.lora_a.bias"))
    assert "`names` holds parameters that were not captured" in message
    assert "'weight'" not in message


def test_a_lora_parameter_of_no_dimension_is_of_another_shape() -> None:
    assert "(4, 2)" in error([source_of("q.lora_A.b.weight", shape=())], parameters("q.lora_A.b.weight", shape=(4, 2)))


def test_same_number_of_elements_is_not_the_same_shape() -> None:
    assert "a (2, 8) for (8, 2)" in error([source_of("a", shape=(2, 8))], parameters("a", shape=(8, 2)))


def test_all_three_at_once() -> None:
    source = SourceGradient({"a": torch.ones(3), "x": torch.ones(2)})
    message = error([source], parameters("a", "b"))
    assert (
        "1 missing from the source (b); 1 unexpected in the source (x); 1 of another shape (a (3,) for (2,))" in message
    )


@pytest.mark.parametrize("count", [5, 6, 100])
def test_long_lists_are_shortened(count: int) -> None:
    message = error([source_of("a")], parameters("a", *(f"layer.{i}" for i in range(count))))
    assert f"{count} missing" in message
    assert "layer.4" in message
    assert "layer.5" not in message
    assert ("more" in message) == (count > 5)
    if count > 5:
        assert f"and {count - 5} more)" in message


def test_several_sources_say_which() -> None:
    names = parameters("a", "b")
    message = error([source_of("a", "b"), source_of("a")], names)
    assert message.startswith("source 1 does not match")
    assert error([source_of("a"), source_of("a", "b")], names).startswith("source 0 does not match")
    assert error([source_of("a")], names).startswith("the source does not match")


def test_parameters_outside_names_are_left_alone() -> None:
    names = parameters("a")
    head = nn.Parameter(torch.zeros(7))
    match_sources([source_of("a")], [{"params": [*names, head]}], Names(names))


def test_named_parameter_outside_the_optimizer_is_not_asked_for() -> None:
    names = parameters("a", "b")
    match_sources([source_of("a")], [{"params": [next(iter(names))]}], Names(names))


class Wrapped(nn.Module):
    """A wrapper like DDP, FSDP and torch.compile, with the model in an attribute."""

    def __init__(self, model: nn.Module, attribute: str) -> None:
        super().__init__()
        self.attribute = attribute
        setattr(self, attribute, model)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, self.attribute)(x)
        return result


def tower(inner: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(3, 3)
    return nn.Sequential(layer if inner is None else Wrapped(layer, inner), nn.ReLU(), nn.Linear(3, 1))


WRAPPINGS: dict[str, nn.Module] = {
    "plain": tower(),
    "ddp": Wrapped(tower(), "module"),
    "compiled": Wrapped(tower(), "_orig_mod"),
    "compiled ddp": Wrapped(Wrapped(tower(), "module"), "_orig_mod"),
    "ddp of compiled": Wrapped(Wrapped(tower(), "_orig_mod"), "module"),
    "one layer compiled": tower("_orig_mod"),
    "fsdp": Wrapped(tower("_fsdp_wrapped_module"), "_fsdp_wrapped_module"),
    "checkpointed layer": tower("_checkpoint_wrapped_module"),
    "really compiled": torch.compile(tower(), backend="eager"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("there", WRAPPINGS)
def test_names_match_through_wrappers(there: str) -> None:
    source = SourceGradient.capture(tower(), [torch.ones(2, 3)], mean_square, curvature=False)
    model = WRAPPINGS[there]
    assert [name for name, _ in model.named_parameters()] != source.names() or there == "plain"
    GradGuide(
        AdamW(model.parameters()), alignment=Alignment(source), names=model.named_parameters(), direction=Direction()
    )
    back = SourceGradient.capture(model, [torch.ones(2, 3)], mean_square, curvature=False)
    assert back.names() == source.names() == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_child_called_module_matches_under_ddp() -> None:
    inner = Wrapped(nn.Linear(3, 1), "module")
    source = SourceGradient.capture(inner, [torch.ones(2, 3)], mean_square, curvature=False)
    wrapped = Wrapped(inner, "module")
    GradGuide(
        AdamW(wrapped.parameters()),
        alignment=Alignment(source),
        names=wrapped.named_parameters(),
        direction=Direction(),
    )


class WithModule(nn.Module):
    """A model with a submodule named ``module``, and parameters with the same names outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 3), 2.0))
        self.module = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x @ self.weight.T + self.module(x)
        return result


def test_a_submodule_called_module_keeps_its_name_also_under_ddp() -> None:
    model = WithModule()
    for wrapped in (model, Wrapped(model, "module"), Wrapped(Wrapped(model, "module"), "_orig_mod")):
        source = SourceGradient.capture(wrapped, [torch.ones(2, 3)], mean_square, curvature=False)
        assert source.names() == ["weight", "module.weight"]
        for names in (wrapped, wrapped.named_parameters()):
            GradGuide(AdamW(wrapped.parameters()), alignment=Alignment(source), names=names, direction=Direction())
    part = SourceGradient({"module.weight": torch.ones(1, 3)})
    inner = list(model.module.parameters())
    GradGuide(AdamW(inner), alignment=Alignment(part), names=model, direction=Direction())
    # Pairs of this submodule alone look like those of DDP, and still match.
    GradGuide(AdamW(inner), alignment=Alignment(part), names={"module.weight": inner[0]}, direction=Direction())


def test_constructor_refuses_before_anything_changes() -> None:
    model = nn.Linear(2, 1)
    base = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"1 missing from the source \(bias\)"):
        GradGuide(
            base,
            alignment=Alignment(source_of("weight", shape=(1, 2))),
            names=model.named_parameters(),
            direction=Direction(),
        )
    with pytest.raises(ValueError, match="found none: pass names"):
        GradGuide(base, alignment=Alignment(source_of("weight")), direction=Direction())
    assert base.state == {}


def test_optimizer_given_named_parameters_needs_no_names() -> None:
    model = nn.Linear(2, 1, bias=False)
    GradGuide(
        SGD(model.named_parameters(), lr=0.1),
        alignment=Alignment(source_of("weight", shape=(1, 2))),
        direction=Direction(),
    )
    with pytest.raises(ValueError, match=r"weight \(2,\) for \(1, 2\)"):
        GradGuide(
            SGD(model.named_parameters(), lr=0.1), alignment=Alignment(source_of("weight")), direction=Direction()
        )


def test_frozen_parameters_need_not_be_in_the_source() -> None:
    """Frozen base parameters in the optimizer, as in PEFT's examples, need no entry in the source."""
    frozen, trained = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(2))
    source = SourceGradient({"trained": torch.tensor([1.0, 0.0])})
    optimizer = GradGuide(
        SGD([frozen, trained], lr=1.0),
        direction=None,
        magnitude=None,
        alignment=Alignment(source, on="gradient", weight=2.0, project=False),
        names={"frozen": frozen, "trained": trained},
    )
    trained.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(trained.grad, torch.tensor([3.0, 1.0]))
    # Unfrozen later, it is guided without the source.
    frozen.requires_grad_(True)
    frozen.grad = torch.ones(3)
    trained.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(frozen.grad, torch.ones(3))
    assert torch.equal(frozen.detach(), torch.zeros(3))
