"""Bad input: the message names the value found, and nothing is changed (rows 15, 21, 23, 25 and the options)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from tests.contract import kit


def source() -> SourceGradient:
    return kit.source_of(kit.net())


nan, inf = float("nan"), float("inf")

# Each: function that makes the options, error type, and pattern of the message.
OPTIONS: list[tuple[Callable[[], object], type[Exception], str]] = [
    *[(lambda v=v: Direction(decay=v), ValueError, rf"decay.*\[0, 1\).*{v}") for v in (1.0, -0.1, 2, nan, inf)],
    *[(lambda v=v: Direction(damping=v), ValueError, rf"damping.*\[0, 1\].*{v}") for v in (1.5, -1e-3, nan)],
    *[(lambda v=v: Magnitude(max_norm=v), ValueError, rf"max_norm.*{v}") for v in (0, -1.0, nan)],
    *[(lambda v=v: Alignment(source(), weight=v), ValueError, rf"weight.*{v}") for v in (-1, inf, nan)],
    (lambda: Direction(decay="0.9"), TypeError, "decay must be a number, found '0.9'"),  # type: ignore[arg-type]
    (lambda: Direction(damping=True), TypeError, "damping must be a number, found True"),
    (lambda: Direction(share_momentum=1), TypeError, "share_momentum must be True or False, found 1"),  # type: ignore[arg-type]
    (lambda: Direction(0.9), TypeError, "positional"),  # type: ignore[call-arg]
    (lambda: Magnitude(max_norm=[1.0]), TypeError, r"max_norm must be a number, found \[1.0\]"),  # type: ignore[arg-type]
    (lambda: Alignment(source(), on="loss"), ValueError, "on must be one of 'update', 'gradient', found 'loss'"),
    (lambda: Alignment(source(), project="yes"), TypeError, "project must be True or False, found 'yes'"),  # type: ignore[arg-type]
    (lambda: Alignment([]), ValueError, "at least one source"),
    (lambda: Alignment([source()] * 17), ValueError, "at most 16 sources, found 17"),
    (lambda: Alignment(torch.ones(3)), TypeError, "SourceGradient.*found Tensor"),  # type: ignore[arg-type]
    (lambda: Alignment([source(), None]), TypeError, "SourceGradient.*found NoneType"),  # type: ignore[list-item]
]


@pytest.mark.parametrize("case", range(len(OPTIONS)))
def test_options_out_of_range_echo_name_and_value(case: int) -> None:
    make, error, message = OPTIONS[case]
    with pytest.raises(error, match=message):
        make()


WRAPPER: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scope": ({"scope": "layer"}, ValueError, "scope must be.*found 'layer'"),
    "scope type": ({"scope": 3}, TypeError, "scope.*found int"),
    "scope by name": ({"scope": {"0.weight": "a"}}, TypeError, "scope must map parameters.*'0.weight'"),
    "scope without names": ({"scope": "module"}, ValueError, "scope='module' needs names"),
    "nonfinite": ({"nonfinite": "ignore"}, ValueError, "nonfinite must be one of 'skip', 'raise', .*found 'ignore'"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of .*found 'cuda'"),
    "direction": ({"direction": 0.9}, TypeError, "direction must be a Direction or None, found 0.9"),
    "alignment": ({"alignment": "source"}, TypeError, "alignment must be an Alignment or None, found 'source'"),
    "magnitude": ({"magnitude": Direction()}, TypeError, "magnitude must be a Magnitude or None, found Direction"),
    "names": ({"names": ["0.weight"]}, TypeError, "names must pair.*'0.weight'"),
    "unknown": ({"clip": 1.0}, TypeError, "clip"),
}


@pytest.mark.parametrize("case", WRAPPER)
def test_wrapper_options_echo_name_and_value(case: str) -> None:
    extra, error, message = WRAPPER[case]
    with pytest.raises(error, match=message):
        GradGuide(kit.sgd(kit.net().parameters()), **extra)


def test_names_that_are_not_unique_are_refused() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"unique.*'w'"):
        GradGuide(kit.sgd([a, b]), names=[("w", a), ("w", b)], direction=Direction())


class Empty(Optimizer):
    """An optimizer without parameters, as some engines leave it."""

    def __init__(self) -> None:
        super().__init__([nn.Parameter(torch.ones(1))], {})
        self.param_groups[0]["params"] = []


def frozen() -> Optimizer:
    return kit.sgd(kit.net().requires_grad_(False).parameters())


BASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no parameters": (Empty, ValueError, "no parameters"),
    "frozen": (frozen, ValueError, "none of the 4 parameters.*requires a gradient"),
    "LBFGS": (lambda: torch.optim.LBFGS(kit.net().parameters()), TypeError, "LBFGS.*first-order"),
    "a class": (lambda: torch.optim.SGD, TypeError, "must be a torch.optim.Optimizer, found type"),
    "a model": (kit.net, TypeError, "found Sequential"),
    "None": (lambda: None, TypeError, "found NoneType"),
    "GradGuide": (
        lambda: GradGuide(kit.sgd(kit.net().parameters()), direction=Direction()),
        TypeError,
        "GradGuide already",
    ),
    "scheduler": (
        lambda: torch.optim.lr_scheduler.StepLR(kit.sgd(kit.net().parameters()), 1),
        TypeError,
        "found StepLR",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_bases_that_cannot_be_guided(case: str) -> None:
    make, error, message = BASES[case]
    with pytest.raises(error, match=message):
        GradGuide(make(), direction=Direction())


@pytest.mark.parametrize("name", ["OptimizerInBackwardWrapper", "LOMO", "AdaLomo", "CPUOffloadOptimizer"])
def test_i25_optimizers_that_run_in_backward_are_refused_with_the_reason(name: str) -> None:
    eater = type(name, (torch.optim.SGD,), {})
    with pytest.raises(TypeError, match=f"{name}.*backward.*no gradient is left"):
        GradGuide(eater(kit.net().parameters(), lr=0.1), direction=Direction())


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_optimizer_that_accelerate_prepared_is_refused_with_the_order() -> None:
    """Its step skips while gradients accumulate, and unscales: GradGuide would guide partial and scaled gradients."""
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(kit.adamw(kit.net().parameters()))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer.*accelerator\.prepare\(GradGuide\(optimizer\)\)"):
        GradGuide(prepared)


def test_an_optimizer_that_lightning_wrapped_is_refused_with_the_order() -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    wrapped: Any = LightningOptimizer(kit.adamw(kit.net().parameters()))
    with pytest.raises(TypeError, match=r"LightningAdamW.*return GradGuide\(optimizer\) from configure_optimizers"):
        GradGuide(wrapped)


def test_an_optimizer_that_fabric_wrapped_is_refused_with_the_order() -> None:
    """With a gradient scaler it unscales within its step: the bound was that of scaled gradients."""
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model = kit.net()
    _, wrapped = fabric.setup(model, kit.adamw(model.parameters()))
    with pytest.raises(TypeError, match=r"FabricAdamW.*fabric\.setup\(model, GradGuide\(optimizer\)\)"):
        GradGuide(wrapped)


def test_source_without_names_is_refused() -> None:
    model = kit.net()
    with pytest.raises(ValueError, match="pass names=model"):
        GradGuide(kit.sgd(model.parameters()), alignment=Alignment(kit.source_of(model)), direction=Direction())
    GradGuide(kit.sgd(model.named_parameters()), alignment=Alignment(kit.source_of(model)), direction=Direction())


def test_source_mismatch_lists_missing_unexpected_and_other_shape() -> None:
    model = kit.net()
    found = {"0.weight": torch.ones(6, 4), "0.bias": torch.ones(7), "2.weight": torch.ones(3, 6), "head": torch.ones(1)}
    with pytest.raises(ValueError) as caught:
        GradGuide(kit.sgd(model.named_parameters()), alignment=Alignment(SourceGradient(found)), direction=Direction())
    message = str(caught.value)
    assert "1 missing from the source (2.bias)" in message
    assert "1 unexpected in the source (head)" in message
    assert "1 of another shape (0.bias (7,) for (6,))" in message
    assert "0.weight" not in message


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)
        self.head = nn.Linear(3, 2)


def spoil_sparse(model: Sparse) -> None:
    model.head(model.table(torch.tensor([1, 2]))).square().sum().backward()


def test_sparse_gradient_is_refused_at_the_step_and_nothing_changes() -> None:
    model = Sparse()
    optimizer = GradGuide(kit.adamw(model.named_parameters()), direction=Direction())
    kit.give_gradients(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    spoil_sparse(model)
    before = kit.parameters_of(model), copy.deepcopy(optimizer.state_dict()), optimizer.metrics()
    head = [p.grad.clone() for p in model.head.parameters() if p.grad is not None]
    with pytest.raises(ValueError, match=r"sparse.*sparse=False"):
        optimizer.step()
    kit.assert_same((kit.parameters_of(model), optimizer.state_dict(), optimizer.metrics()), before)
    kit.assert_same([p.grad for p in model.head.parameters()], head)


def test_complex_gradient_is_refused_at_the_step_and_nothing_changes() -> None:
    pair = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    optimizer = GradGuide(kit.adamw(pair.named_parameters()), direction=Direction())
    for parameter in pair:
        parameter.grad = torch.ones_like(parameter)
    before = kit.snapshot(pair, optimizer)
    with pytest.raises(ValueError, match=r"complex \(torch.complex64\)"):
        optimizer.step()
    kit.assert_same(kit.snapshot(pair, optimizer), before)


def test_bad_group_is_refused_and_changes_nothing() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, "on update")
    kit.train(model, optimizer, range(2))
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [next(model.parameters())]})
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": ["a string"]})
    kit.assert_same(kit.snapshot(model, optimizer), before)
    kit.train(model, optimizer, range(2, 4))
    assert optimizer.metrics()["steps"] == 4


def test_added_group_that_the_source_does_not_know_is_refused_by_name() -> None:
    model = kit.net()
    optimizer = GradGuide(
        kit.adamw(model.named_parameters()), alignment=Alignment(kit.source_of(model)), direction=Direction()
    )
    kit.train(model, optimizer, range(2))
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"missing from the source \(late\)"):
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert len(optimizer.param_groups) == 1
