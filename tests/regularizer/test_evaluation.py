"""Side effects that the second evaluation must not have, and closures that cannot work."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradguide import Alignment, Direction, GradGuide, Regularizer, guided_loss
from tests.contract import kit


class Noisy(nn.Module):
    """A network with dropout and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.drop(torch.tanh(self.norm(self.first(x)))))
        return found


def guide(model: nn.Module, lr: float = 0.1, **options: Any) -> GradGuide:
    options = {"magnitude": 0.3, "warmup": 0} | options
    base = torch.optim.SGD(model.parameters(), lr=lr)
    return GradGuide(base, magnitude=None, regularizer=Regularizer(**options), direction=Direction())


def closure_of(model: nn.Module, optimizer: GradGuide, step: int = 0) -> Any:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = kit.loss_of(model, kit.batch(step))
        loss.backward()
        return loss

    return evaluate


def test_buffers_and_randomness_are_those_of_one_evaluation() -> None:
    model, plain = Noisy(), Noisy()
    optimizer = guide(model)
    torch.manual_seed(1)
    loss = optimizer.step(closure_of(model, optimizer))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    wanted = kit.loss_of(plain, kit.batch(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loss.detach(), wanted.detach()), "what the first evaluation gave"
    kit.assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_buffers_of_a_compiled_model_are_those_of_one_evaluation() -> None:
    """Compiled code calls no hooks on modules, so the model must be known."""
    model, plain = Noisy(), Noisy()
    model.compile(backend="eager")
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = GradGuide(base, magnitude=None, regularizer=Regularizer(magnitude=0.3, warmup=0), names=model)
    for step in range(3):
        optimizer.step(closure_of(model, optimizer, step))
        kit.loss_of(plain, kit.batch(step))
    kit.assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_dropout_draws_the_same_mask_in_both_evaluations() -> None:
    """With different masks, their difference would dominate the quotient."""
    model, twin = Noisy().double(), Noisy().double()
    optimizer = guide(model)
    x, y = kit.batch(0, dtype=torch.float64)

    def evaluate() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    torch.manual_seed(1)
    optimizer.step(evaluate)
    torch.manual_seed(1)
    guided_loss(F.cross_entropy(twin(x), y), twin.named_parameters(), magnitude_weight=0.3).backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    torch.testing.assert_close(kit.parameters_of(model), kit.parameters_of(twin), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("enabled", [False, True])
def test_an_outer_autocast_changes_nothing(enabled: bool) -> None:
    """It caches the casts of the parameters, which differ in the second evaluation and after it."""
    found = []
    for outer in (nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=enabled)):
        model = kit.net()
        optimizer = guide(model, lr=0.0, magnitude=1.0)

        def evaluate(model: nn.Module = model) -> Tensor:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = kit.loss_of(model, kit.batch(0))
            loss.backward()
            return loss

        with outer:
            optimizer.step(evaluate)
            with torch.autocast("cpu", torch.bfloat16):
                after = kit.loss_of(model, kit.batch(0)).detach()
        found.append([after, *(p.grad for p in model.parameters())])
    kit.assert_same(found[1], found[0])


def test_parameters_are_back_bit_for_bit_before_the_base_steps() -> None:
    model = Noisy()
    before = kit.parameters_of(model)
    optimizer = guide(model, lr=0.0)
    optimizer.step(closure_of(model, optimizer))
    kit.assert_same(kit.parameters_of(model), before)
    assert optimizer.metrics()["steps"] == 1


def test_a_closure_that_fails_the_second_time_leaves_everything_as_the_first_left_it() -> None:
    model = Noisy()
    optimizer = guide(model)
    optimizer.step(closure_of(model, optimizer))
    state = copy.deepcopy(optimizer.state_dict())
    calls: list[int] = []
    inner = closure_of(model, optimizer, step=1)

    def fails() -> Tensor:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        found: Tensor = inner()
        return found

    before, plain = kit.parameters_of(model), copy.deepcopy(model)
    torch.manual_seed(9)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    random = torch.get_rng_state()
    kit.assert_same(kit.parameters_of(model), before)
    kit.assert_same(optimizer.state_dict(), state)
    torch.manual_seed(9)
    plain.zero_grad()
    kit.loss_of(plain, kit.batch(1)).backward()
    assert torch.equal(random, torch.get_rng_state())
    kit.assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    kit.assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_gradients_that_are_views_of_a_shared_buffer_survive() -> None:
    """As under DDP, where the second backward pass writes to the memory of the first one's gradients."""
    found = []
    for shared in (False, True):
        model = kit.net()
        sizes = [p.numel() for p in model.parameters()]
        buffer = torch.zeros(sum(sizes))

        optimizer = guide(model)

        def evaluate(
            model: nn.Module = model, buffer: Tensor = buffer, sizes: list[int] = sizes, shared: bool = shared
        ) -> Tensor:
            model.zero_grad()
            loss = kit.loss_of(model, kit.batch(0))
            loss.backward()
            if shared:
                for p, part in zip(model.parameters(), buffer.split(sizes), strict=True):
                    assert p.grad is not None
                    p.grad = part.copy_(p.grad.reshape(-1)).view_as(p)
            return loss

        optimizer.step(evaluate)
        found.append(kit.parameters_of(model))
    kit.assert_same(found[1], found[0])


@pytest.mark.parametrize("returned", ["loss", "number", "nothing"])
def test_gradients_of_another_optimizer_are_those_of_one_evaluation(returned: str) -> None:
    """The closure clears those of its own optimizer, and the others accumulate. Sparse ones are kept too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    body, others = list(model[2].parameters()), [*model[0].parameters(), *model[4].parameters()]
    base = torch.optim.SGD(body, lr=0.1)
    regularizer = Regularizer(magnitude=0.3, warmup=0)
    names = None if returned == "loss" else model
    optimizer = GradGuide(base, magnitude=None, regularizer=regularizer, names=names)
    x, y = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 2])

    def evaluate() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return {"loss": loss, "number": loss.item(), "nothing": None}[returned]

    evaluate()
    once = [torch.clone(p.grad.to_dense()) for p in others if p.grad is not None]
    optimizer.step(evaluate)
    twice = [p.grad.to_dense() for p in others if p.grad is not None]
    torch.testing.assert_close(twice, [2 * gradient for gradient in once])


def test_a_frozen_parameter_that_keeps_its_gradient_is_not_regularized() -> None:
    """Every base steps what has a gradient, and ``zero_grad(set_to_none=False)`` leaves one."""
    model, plain = kit.net(), kit.net()
    optimizers = [guide(model), guide(plain)]
    for each, optimizer, set_to_none in ((model, optimizers[0], False), (plain, optimizers[1], True)):

        def evaluate(each: nn.Module = each, set_to_none: bool = set_to_none) -> Tensor:
            each.zero_grad(set_to_none)
            loss = kit.loss_of(each, kit.batch(0))
            loss.backward()
            return loss

        optimizer.step(evaluate)
        first = next(each.parameters()).requires_grad_(False)
        before = first.detach().clone()
        optimizer.step(evaluate)
        assert torch.equal(first, before)
    torch.testing.assert_close(kit.parameters_of(model), kit.parameters_of(plain), rtol=1e-3, atol=1e-5)


def test_a_frozen_parameter_does_not_move_for_the_second_evaluation() -> None:
    """The running direction of its time as a trained parameter has a part along it."""
    model = kit.net()
    optimizer = guide(model, direction=0.5)
    first = next(model.parameters())
    values: list[Tensor] = []

    def evaluate() -> Tensor:
        model.zero_grad(set_to_none=False)
        values.append(first.detach().clone())
        loss = kit.loss_of(model, kit.batch(0))
        loss.backward()
        return loss

    for trained in (True, True, False):
        first.requires_grad_(trained)
        optimizer.step(evaluate)
    assert not torch.equal(values[3], values[2]), "a trained one moves"
    assert torch.equal(values[5], values[4])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_adds_to_earlier_gradients_is_refused(set_to_none: bool) -> None:
    """As with Lightning's ``accumulate_grad_batches``. Their difference would be divided by the small perturbation."""
    model = kit.net()
    optimizer = guide(model)
    clearing = closure_of(model, optimizer)

    def adding() -> Tensor:
        loss = kit.loss_of(model, kit.batch(1))
        loss.backward()
        return loss

    optimizer.step(clearing)
    before = kit.parameters_of(model)
    with pytest.raises(RuntimeError, match=r"adds to gradients from before it.*zero_grad\(\) in the closure"):
        optimizer.step(adding)
    kit.assert_same(kit.parameters_of(model), before)
    optimizer.zero_grad(set_to_none)
    optimizer.step(adding)
    assert kit.differ(kit.parameters_of(model), before)


def test_a_closure_that_clears_gradients_in_place_is_never_refused() -> None:
    """In bfloat16 the perturbation is large, and its change of the gradient can equal the gradient before."""
    for rate in (0.1, 1.0, 1.5):
        parameter = nn.Parameter(torch.full((20,), 3.5, dtype=torch.bfloat16))
        curvature = torch.linspace(0.1, 1.0, 20).bfloat16()
        base = torch.optim.SGD([parameter], lr=rate)
        optimizer = GradGuide(base, direction=Direction(), regularizer=Regularizer(direction=0.1), magnitude=None)

        def clearing(p: Tensor = parameter, curvature: Tensor = curvature, optimizer: GradGuide = optimizer) -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            loss = (0.5 * curvature * (p - 2).square()).sum()
            loss.backward()
            return loss

        for _ in range(60):
            optimizer.step(clearing)


def test_an_earlier_gradient_that_the_closure_does_not_touch_has_no_further_term() -> None:
    model, other = kit.net(), nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([*model.parameters(), other], lr=0.1)
    optimizer = GradGuide(base, direction=Direction(), regularizer=Regularizer(direction=0.1), magnitude=None)

    def closure() -> Tensor:
        model.zero_grad()
        loss = kit.loss_of(model, kit.batch(1))
        loss.backward()
        return loss

    other.grad = torch.full((3,), 0.5)
    for step in range(1, 3):
        before = other.detach().clone()
        optimizer.step(closure)
        assert torch.allclose(other, before - 0.1 * 0.5), step


def test_a_parameter_without_a_second_gradient_has_no_further_term() -> None:
    model = kit.net()
    optimizer = guide(model)
    last = list(model.parameters())[-1]
    calls: list[int] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = kit.loss_of(model, kit.batch(0))
        loss.backward()
        if calls:
            last.grad = None
        calls.append(1)
        return loss

    before = last.detach().clone()
    optimizer.step(evaluate)
    plain = kit.net()
    kit.loss_of(plain, kit.batch(0)).backward()
    gradient = list(plain.parameters())[-1].grad
    assert gradient is not None
    torch.testing.assert_close(before - last.detach(), 0.1 * gradient)


def test_step_without_a_closure_is_refused_and_nothing_changes() -> None:
    model = kit.net()
    optimizer = guide(model)
    kit.give_gradients(model, 0)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)


def test_grad_scaler_meets_the_same_refusal() -> None:
    model = kit.net()
    optimizer = guide(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(kit.loss_of(model, kit.batch(0))).backward()
    before = kit.parameters_of(model)
    with pytest.raises(RuntimeError, match="GradScaler and Trainer pass none"):
        scaler.step(optimizer)
    kit.assert_same(kit.parameters_of(model), before)


def test_a_closure_that_skips_backward_the_second_time_is_refused() -> None:
    model = kit.net()
    optimizer = guide(model)
    before = kit.parameters_of(model)
    calls: list[int] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = kit.loss_of(model, kit.batch(0))
        if not calls:
            loss.backward()
        calls.append(1)
        return loss

    with pytest.raises(RuntimeError, match="no gradient when it was evaluated a second time"):
        optimizer.step(evaluate)
    kit.assert_same(kit.parameters_of(model), before)


def test_attention_without_a_second_derivative_works() -> None:
    project = nn.Linear(16, 48)
    x = torch.randn(2, 5, 16)
    optimizer = guide(project)

    def evaluate() -> Tensor:
        project.zero_grad()
        q, k, v = project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        loss = F.scaled_dot_product_attention(q, k, v).square().mean()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    assert optimizer.metrics()["steps"] == 1


def test_a_linear_loss_has_no_curvature() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GradGuide(
        torch.optim.SGD([parameter], lr=0.1),
        magnitude=None,
        regularizer=Regularizer(magnitude=0.3, warmup=0),
        direction=Direction(),
    )

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter * torch.tensor([3.0, 4.0])).sum()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    torch.testing.assert_close(parameter.detach(), torch.tensor([1.0, 2.0]) - 0.1 * torch.tensor([3.0, 4.0]))


def test_not_finite_is_skipped() -> None:
    model = kit.net()
    optimizer = guide(model)
    before = kit.parameters_of(model)
    inner = closure_of(model, optimizer)

    def evaluate() -> Tensor:
        inner()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.fill_(float("nan"))
        return torch.tensor(float("nan"))

    optimizer.step(evaluate)
    assert optimizer.metrics()["skipped"] == 1
    kit.assert_same(kit.parameters_of(model), before)


def test_a_second_evaluation_that_is_not_finite_is_named_as_such() -> None:
    model = kit.net()
    regularizer = Regularizer(magnitude=0.3, warmup=0)
    optimizer = GradGuide(kit.sgd(model.parameters()), regularizer=regularizer, nonfinite="raise")
    calls: list[int] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        calls.append(1)
        loss = kit.loss_of(model, kit.batch(0)) * (1.0 if len(calls) == 1 else float("nan"))
        loss.backward()
        return loss

    before = kit.parameters_of(model)
    with pytest.raises(FloatingPointError, match="gradient of the regularizer, from the second evaluation of the clos"):
        optimizer.step(evaluate)
    kit.assert_same(kit.parameters_of(model), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "a weight above 0"),
        ({"direction": -0.1}, ValueError, r"direction must be in \[0, inf\), found -0.1"),
        ({"magnitude": "1"}, TypeError, "magnitude must be a number, found '1'"),
        ({"alignment": 0.1}, ValueError, r"alignment=0.1\) needs a source, found none"),
        ({"magnitude": 0.1, "warmup": -1}, ValueError, "warmup must be in"),
        ({"magnitude": 0.1, "warmup": 1.5}, TypeError, "warmup must be a whole number"),
        ({"alignment": 0.1, "source": "films"}, TypeError, "source must be a SourceGradient or the like, found str"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Regularizer(**options)


def test_what_a_regularizer_needs_of_gradguide() -> None:
    model = kit.net()
    source = kit.source_of(model)
    with pytest.raises(ValueError, match="alignment above 0, found 0"):
        Regularizer(magnitude=0.1, source=source)
    with pytest.raises(ValueError, match=r"Regularizer\(direction=0.1\) needs a direction.*pass direction=Direction"):
        GradGuide(kit.sgd(model.parameters()), direction=None, regularizer=Regularizer(direction=0.1))
    with pytest.raises(ValueError, match="keyed by parameter names, found none"):
        GradGuide(
            kit.sgd(model.parameters()), regularizer=Regularizer(alignment=0.1, source=source), direction=Direction()
        )
    with pytest.raises(TypeError, match="regularizer must be a Regularizer or None"):
        GradGuide(kit.sgd(model.parameters()), regularizer=0.1, direction=Direction())  # type: ignore[arg-type]


def test_it_works_beside_every_rule_and_survives_copies() -> None:
    """Sources of alignment and regularizer are kept apart, and a copy continues bit for bit."""
    model = kit.net()
    source, other = kit.source_of(model, seed=7), kit.source_of(model, seed=8)
    optimizer = GradGuide(
        kit.adamw(model.parameters()),
        alignment=Alignment(source, weight=0.5),
        regularizer=Regularizer(direction=0.2, magnitude=0.1, alignment=0.3, source=other, warmup=2),
        names=model.named_parameters(),
        direction=Direction(),
    )
    for step in range(4):
        optimizer.step(closure_of(model, optimizer, step))
    assert "source_cosine/1" not in optimizer.metrics(), "metrics are of the alignment's sources"
    assert "regularizer" in repr(optimizer).lower()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for step in (4, 5):
        optimizer.step(closure_of(model, optimizer, step))
        twin_optimizer.step(closure_of(twin, twin_optimizer, step))
    kit.assert_same(kit.parameters_of(twin), kit.parameters_of(model))
