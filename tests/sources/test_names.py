"""Give names of parameters: accepted forms, time of reading, and names given later."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from gradguide import Alignment, GradGuide, SourceGradient

WEIGHT = 3.0
FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda model: model,
    "pairs": lambda model: list(model.named_parameters()),
    "generator": lambda model: model.named_parameters(),
    "by name": lambda model: dict(model.named_parameters()),
    "by parameter": lambda model: {p: name for name, p in model.named_parameters()},
}


def model_of(layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers)))


def source_of(model: nn.Module) -> SourceGradient:
    torch.manual_seed(1)
    return SourceGradient({name: torch.randn(p.shape) for name, p in model.named_parameters()})


def pull(source: SourceGradient) -> Alignment:
    return Alignment(source, weight=WEIGHT, project=False)


def guide(parameters: Any, **options: Any) -> GradGuide:
    return GradGuide(SGD(parameters, lr=0.1), direction=None, magnitude=None, **options)


def pulled(optimizer: GradGuide, source: SourceGradient, names: Mapping[nn.Parameter, str]) -> None:
    """Step, and check that each named parameter is pulled by its own entry, and others are not pulled."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    row = source.row(source.names(), [torch.zeros(shape) for shape in source.shapes().values()])
    table = {name: row.value(i, torch.float32).view(source.shapes()[name]) for i, name in enumerate(source.names())}
    for p in parameters:
        wanted = torch.ones_like(p) + (WEIGHT * table[names[p]] if p in names else 0.0)
        torch.testing.assert_close(p.grad, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_taken_everywhere(form: str) -> None:
    model = model_of()
    source = source_of(model)
    names = {p: name for name, p in model.named_parameters()}
    pulled(guide(model.parameters(), alignment=pull(source), names=FORMS[form](model)), source, names)
    later = guide(model.parameters())
    later.set_alignment(pull(source), names=FORMS[form](model))
    pulled(later, source, names)
    captured = SourceGradient.capture(
        model, [torch.ones(2, 3)], lambda m, b: m(b).sum(), curvature=False, names=FORMS[form](model)
    )
    assert captured.names() == list(names.values())


def test_capture_takes_what_names_hold_and_what_is_trained() -> None:
    model = model_of(3)
    model[1].requires_grad_(False)

    def capture(names: Any) -> list[str]:
        batches = [torch.ones(2, 3)]
        return SourceGradient.capture(model, batches, lambda m, b: m(b).sum(), curvature=False, names=names).names()

    assert capture(None) == ["0.weight", "2.weight"]
    assert capture({"2.weight": model.get_parameter("2.weight"), "1.weight": model.get_parameter("1.weight")}) == [
        "2.weight"
    ]
    assert capture([("mine", model.get_parameter("2.weight")), ("other", nn.Parameter(torch.ones(1)))]) == ["mine"]
    with pytest.raises(ValueError, match=r"names hold none of the 2 parameters .*such as 0\.weight"):
        capture(model_of(3))
    with pytest.raises(ValueError, match="names hold none of the 2 parameters"):
        capture(model[1].named_parameters())
    with pytest.raises(TypeError, match="names must pair"):
        capture(["0.weight"])


def test_capture_of_some_leaves_the_gradients_of_all() -> None:
    model = model_of()
    held = [torch.full((3, 3), 7.0), torch.full((3, 3), 8.0)]
    for p, g in zip(model.parameters(), held, strict=True):
        p.grad = g
    names = [("1.weight", model.get_parameter("1.weight"))]
    source = SourceGradient.capture(
        model, [torch.ones(2, 3)], lambda m, b: m(b).sum() / 2, curvature=False, names=names
    )
    wanted = torch.outer(torch.ones(3), model.get_parameter("0.weight").detach() @ torch.ones(3))
    torch.testing.assert_close(
        source.row(["1.weight"], [model.get_parameter("1.weight").detach()]).value(0, torch.float32), wanted.view(-1)
    )
    for p, g in zip(model.parameters(), held, strict=True):
        assert p.grad is g
    assert torch.equal(held[0], torch.full((3, 3), 7.0))


def test_i35_names_given_later_are_merged() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    source = SourceGradient({"a": torch.ones(3), "b": 2 * torch.ones(3)})
    optimizer = guide([a], names=[("a", a)])
    optimizer.add_param_group({"params": [b]})
    with pytest.raises(ValueError, match=r"1 unexpected in the source \(b\)"):
        optimizer.set_alignment(pull(source))
    optimizer.set_alignment(pull(source), names=[("b", b)])
    pulled(optimizer, source, {a: "a", b: "b"})


def test_i35_a_group_added_later_has_the_names_of_the_model() -> None:
    model = model_of(3)
    source = source_of(model)
    optimizer = guide(model[0].parameters(), names=model)
    optimizer.add_param_group({"params": [model.get_parameter("1.weight")]})
    optimizer.add_param_group({"params": model.get_parameter("2.weight")})
    optimizer.set_alignment(pull(source))
    pulled(optimizer, source, {p: name for name, p in model.named_parameters()})


def test_i35_a_layer_added_to_the_model_later_has_a_name() -> None:
    model = model_of(1)
    optimizer = guide(model.parameters(), names=model)
    model.append(nn.Linear(3, 3, bias=False))
    source = source_of(model)
    optimizer.add_param_group({"params": [model.get_parameter("1.weight")]})
    optimizer.set_alignment(pull(source))
    pulled(optimizer, source, {p: name for name, p in model.named_parameters()})


def test_a_group_that_a_source_lacks_is_refused_with_nothing_changed() -> None:
    model = model_of(2)
    optimizer = guide(model[0].parameters(), names=model, alignment=pull(source_of(model[:1])))
    with pytest.raises(ValueError, match=r"1 missing from the source \(1\.weight\).*not n\.startswith\('1\.'\)"):
        optimizer.add_param_group({"params": [model.get_parameter("1.weight")]})
    assert len(optimizer.param_groups) == 1
    pulled(optimizer, source_of(model[:1]), {model.get_parameter("0.weight"): "0.weight"})


@pytest.mark.parametrize("where", ["base", "list"])
def test_a_parameter_that_a_source_lacks_is_refused_at_the_step_after_it_was_added(where: str) -> None:
    model = model_of(2)
    optimizer = guide(model[0].parameters(), names=model, alignment=pull(source_of(model[:1])))
    added = model.get_parameter("1.weight")
    if where == "base":
        optimizer.base.add_param_group({"params": [added]})
    else:
        optimizer.param_groups[0]["params"].append(added)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 missing from the source \(1\.weight\).*not n\.startswith\('1\.'\)"):
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    optimizer.set_alignment(pull(source_of(model)))
    pulled(optimizer, source_of(model), {p: name for name, p in model.named_parameters()})


def test_i35_parameters_that_were_replaced_are_found_by_the_model() -> None:
    """Parameters are replaced as by ``fully_shard``, before and after the optimizer is created."""
    model = model_of()
    source = source_of(model)

    def replaced() -> list[nn.Parameter]:
        for layer in model:
            layer.weight = nn.Parameter(layer.get_parameter("weight").detach().clone())
        return list(model.parameters())

    optimizer = guide(replaced(), alignment=pull(source), names=model)
    pulled(optimizer, source, {p: name for name, p in model.named_parameters()})
    optimizer.param_groups[0]["params"] = replaced()[::-1]  # in another order, so that the position gives no hint
    pulled(optimizer, source, {p: name for name, p in model.named_parameters()})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_i20_an_optimizer_with_a_model_as_names_can_be_copied(copied: Callable[[Any], Any]) -> None:
    model = model_of()
    source = source_of(model)
    frozen = nn.Linear(300, 300)
    model.append(frozen.requires_grad_(False))
    optimizer = guide(model[:2].parameters(), alignment=pull(source), names=model)
    alone = pickle.dumps(optimizer)
    assert len(alone) < 300 * 300 * 4  # frozen weights are not included
    twin_model, twin = copied((model, optimizer))
    pulled(twin, source, {p: name for name, p in twin_model[:2].named_parameters()})


def test_one_name_for_two_parameters_of_the_optimizer() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = guide([a, b], names=[("a", a)])
    with pytest.raises(ValueError, match="found 'a' for two parameters of the optimizer"):
        optimizer.set_alignment(pull(SourceGradient({"a": torch.ones(3)})), names=[("a", b)])
    optimizer.set_alignment(pull(SourceGradient({"a": torch.ones(3)})))


def test_bad_names_change_nothing() -> None:
    model = model_of()
    source = source_of(model)
    optimizer = guide(model.parameters(), alignment=pull(source), names=model)
    for wrong in (["0.weight"], 3):
        with pytest.raises(TypeError, match="names must"):
            optimizer.set_alignment(None, names=wrong)  # type: ignore[arg-type]
    pulled(optimizer, source, {p: name for name, p in model.named_parameters()})
