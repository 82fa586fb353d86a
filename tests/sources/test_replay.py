"""Replay source batches for live source gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import Alignment, Direction, GradGuide, Regularizer, ReplaySource
from tests.contract import kit
from tests.sources.replayed import LossOf, guide, old, replay_of


def answer(source: ReplaySource, model: nn.Module) -> Tensor:
    """Return the source's gradient of all parameters of the model."""
    named = dict(model.named_parameters())
    return flat(source.row(list(named), list(named.values())).tensors)


def refresh(source: ReplaySource, model: nn.Module) -> None:
    named = dict(model.named_parameters())
    source.refresh(named, list(named.values()))


def gradient_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found = torch.autograd.grad(kit.loss_of(model, batch), list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in found])


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_the_projection_is_that_of_a_gem() -> None:
    """On conflict the gradient is g - (g.r / r.r) r, where r is the gradient of the next source batch."""
    model = kit.net()
    optimizer = guide(model, replay_of(model))
    conflicts = 0
    for step in range(8):
        g, r = gradient_of(model, kit.batch(step)), gradient_of(model, old(step % 3))
        if step % 2:
            g = g - 2 * (g @ r) / (r @ r) * r if g @ r > 0 else g
        conflicts += bool(g @ r < 0)
        wanted = g - (g @ r) / (r @ r) * r if g @ r < 0 else g
        sizes = [p.numel() for p in model.parameters()]
        for p, part in zip(model.parameters(), g.split(sizes), strict=True):
            p.grad = part.view_as(p).clone()
        before = flat(model.parameters())
        optimizer.step()
        torch.testing.assert_close((before - flat(model.parameters())) / 0.1, wanted, rtol=1e-4, atol=1e-5)
        assert optimizer.metrics()["conflict"] == float(g @ r < 0)
    assert conflicts >= 4


def test_a_source_of_alignment_and_regularizer_is_evaluated_once() -> None:
    model = kit.net()
    loss = LossOf(model)

    def closure() -> Tensor:
        model.zero_grad()
        found = kit.loss_of(model, kit.batch(0))
        found.backward()
        return found

    source = ReplaySource([old(0), old(1), old(2)], loss, every=2)
    optimizer = guide(model, source, regularizer=Regularizer(alignment=0.1, source=source))
    for _ in range(4):
        optimizer.step(closure)
    assert loss.calls == 2, "at steps 0 and 2"


def test_between_evaluations_the_last_answer_stands() -> None:
    model = kit.net()
    loss = LossOf(model)
    source = ReplaySource([old(0), old(1)], loss, every=3)
    optimizer = guide(model, source)
    answers = []
    for step in range(7):
        kit.train(model, optimizer, [step])
        answers.append(answer(source, model))
    assert loss.calls == 3, "at steps 0, 3 and 6"
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[2], answers[3])


def test_a_weighted_pull_adds_the_live_gradient() -> None:
    """Weight 1 without projection equals training on the sum of both losses."""
    model, plain = kit.net(), kit.net()
    optimizer = guide(model, replay_of(model), alignment={"weight": 1.0, "project": False})
    other = kit.sgd(plain.parameters())
    for step in range(5):
        kit.train(model, optimizer, [step])
        other.zero_grad()
        (kit.loss_of(plain, kit.batch(step)) + kit.loss_of(plain, old(step % 3))).backward()
        other.step()
    torch.testing.assert_close(kit.parameters_of(model), kit.parameters_of(plain))


def test_a_run_resumed_with_batches_that_continue_equals_one_that_was_not_stopped() -> None:
    """A checkpoint is saved at a multiple of ``every``; the batches are those after the ones that were evaluated."""
    batches = [old(i) for i in range(3)]
    model = kit.net()
    pull = {"weight": 1.0, "project": False}
    optimizer = guide(model, replay_of(model, every=2), alignment=pull)
    kit.train(model, optimizer, range(4))
    resumed = copy.deepcopy(model)
    source = ReplaySource(batches[2:] + batches[:2], LossOf(resumed), every=2)
    other = guide(resumed, source, alignment=pull)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kit.train(model, optimizer, range(4, 10))
    kit.train(resumed, other, range(4, 10))
    kit.assert_same(kit.parameters_of(resumed), kit.parameters_of(model))


def test_beside_a_stored_source_each_has_its_metrics() -> None:
    model = kit.net()
    stored = kit.source_of(model)
    optimizer = guide(model, [stored, replay_of(model)])
    kit.train(model, optimizer, range(3))
    found = optimizer.metrics()
    assert {"source_cosine/0", "source_cosine/1"} <= found.keys()
    assert found["source_cosine/0"] != found["source_cosine/1"]


def test_a_scaler_s_scale_is_divided_out_and_an_overflow_keeps_the_last_answer() -> None:
    model = kit.net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.zeros(()))  # initialises its scale
    source = ReplaySource([old(0)], LossOf(model, [1.0, torch.inf]), scaler=scaler)
    refresh(source, model)
    first = answer(source, model)
    torch.testing.assert_close(first, gradient_of(model, old(0)))
    refresh(source, model)
    assert torch.equal(answer(source, model), first)


def test_a_gradient_that_overflows_at_the_scaler_s_scale_is_evaluated_at_a_lower_one() -> None:
    """The scaler does not see it, so it kept its scale, and every step was skipped."""
    model = kit.net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))  # initialises its scale
    scales: list[float] = []

    def note(gradient: Tensor) -> Tensor:
        scales.append(float(gradient))
        return gradient * (torch.inf if float(gradient) > 2.0**13 else 1.0)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        found = kit.loss_of(model, batch)
        found.register_hook(note)
        return found

    source = ReplaySource([old(0)], loss, scaler=scaler)
    refresh(source, model)
    assert scales == [2.0**16, 2.0**15, 2.0**14, 2.0**13]
    torch.testing.assert_close(answer(source, model), gradient_of(model, old(0)))
    for _ in range(2500):
        refresh(source, model)
    assert 2.0**12 < scales[-1] < 2.0**13, "it grows again, and is halved again"
    assert len(scales) == 4 + 2500


def test_until_a_gradient_is_finite_every_step_evaluates() -> None:
    """The first one cannot be replaced by an earlier one, so the step is skipped."""
    model = kit.net()
    loss = LossOf(model, [torch.inf, torch.inf, 1.0, torch.inf])
    optimizer = guide(model, ReplaySource([old(0)], loss, every=4))
    evaluations = []
    for step in range(9):
        kit.train(model, optimizer, [step])
        evaluations.append(loss.calls)
    assert evaluations == [1, 2, 3, 3, 4, 4, 4, 4, 5]
    assert (optimizer.metrics()["skipped"], optimizer.metrics()["steps"]) == (2, 7)


@pytest.mark.parametrize("every", [1, 3])
def test_a_parameter_of_another_shape_is_evaluated_anew(every: int) -> None:
    p = nn.Parameter(torch.ones(3))
    source = ReplaySource([0], lambda _: 2.0 * p.square().sum(), every)
    alignment = Alignment(source, on="gradient", weight=1.0)
    base = torch.optim.SGD([p], lr=0.0)
    optimizer = GradGuide(base, direction=None, magnitude=None, alignment=alignment, names={"p": p})
    for value in (p.data, torch.ones(5)):
        p.data = value
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(p.grad, torch.full_like(value, 6.0))


def test_a_copy_starts_again_at_the_first_batch_and_steps_by_itself() -> None:
    model = kit.net()
    optimizer = guide(model, replay_of(model), alignment={"weight": 1.0, "project": False})
    kit.train(model, optimizer, range(2))
    twin, copied = copy.deepcopy((model, optimizer))

    def step_matches(model: nn.Module, optimizer: GradGuide, source_batch: int) -> None:
        gradient = gradient_of(model, kit.batch(2)) + gradient_of(model, old(source_batch))
        wanted = flat(model.parameters()) - 0.1 * gradient
        kit.train(model, optimizer, [2])
        torch.testing.assert_close(flat(model.parameters()), wanted)

    untouched = kit.parameters_of(model)
    step_matches(twin, copied, source_batch=0)
    kit.assert_same(kit.parameters_of(model), untouched)
    step_matches(model, optimizer, source_batch=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([old(0)], len, 0), ValueError, "every must be at least 1, found 0"),
        (([old(0)], len, 1.5), TypeError, "every must be a whole number of steps, found 1.5"),
        ((3, len), TypeError, "batches must be iterable, found int"),
    ],
)
def test_bad_options(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ReplaySource(*arguments)


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], LossOf, "found none; a generator can be read only once"),
        ([old(0)], lambda model: lambda batch: torch.tensor(1.0), "must be a scalar with its graph"),
        ([old(0)], lambda model: lambda batch: kit.loss_of(kit.net(), batch), "reaches none of the guided parameters"),
    ],
)
def test_what_cannot_be_replayed_changes_nothing(batches: Any, loss: Any, message: str) -> None:
    model = kit.net()
    optimizer = guide(model, ReplaySource(batches, loss(model)))
    kit.give_gradients(model, 0)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)


def test_a_group_that_is_added_is_asked_about_too() -> None:
    model = nn.ModuleDict({"first": kit.net(), "late": nn.Linear(3, 3)})

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model["late"](model["first"](batch[0])), batch[1])

    source = ReplaySource([old(0)], loss)
    first = [(f"first.{name}", p) for name, p in model["first"].named_parameters()]
    optimizer = GradGuide(kit.sgd(first), alignment=Alignment(source), direction=Direction())
    loss(kit.batch(0)).backward()
    optimizer.step()
    optimizer.add_param_group({"params": [("late.weight", model["late"].weight), ("late.bias", model["late"].bias)]})
    optimizer.step()
    assert {"late.weight", "late.bias"} <= source._rows.keys()


@pytest.mark.parametrize("where", ["base", "list"])
def test_a_parameter_added_without_the_wrapper_is_pulled(where: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    a, b = model.parameters()
    base = torch.optim.SGD([a], lr=0.1)
    source = ReplaySource([0], lambda _: torch.as_tensor(a.sum() + b.sum()))
    optimizer = GradGuide(
        base, magnitude=None, alignment=Alignment(source, weight=1.0, project=False), names=model, scope="tensor"
    )
    a.grad = torch.ones(2, 2)
    optimizer.step()
    if where == "base":
        base.add_param_group({"params": [b]})
    else:
        optimizer.param_groups[0]["params"].append(b)
    a.grad, b.grad = torch.ones(2, 2), torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(a.grad, torch.full((2, 2), 2.0))
    assert torch.equal(b.grad, torch.full((2, 2), 2.0))


def test_it_needs_names() -> None:
    model = kit.net()
    with pytest.raises(ValueError, match="keyed by parameter names, found none"):
        GradGuide(kit.sgd(model.parameters()), alignment=Alignment(replay_of(model)), direction=Direction())


def test_a_frozen_parameter_that_keeps_its_gradient_is_stepped_with_a_zero_row() -> None:
    """Freezing leaves the gradient where it is, and every base steps what has one."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    source = ReplaySource([0], lambda _: a.square().sum() + b.square().sum())
    alignment = Alignment(source, on="gradient", weight=1.0)
    base = torch.optim.SGD([a, b], lr=0.1)
    optimizer = GradGuide(base, direction=None, magnitude=None, alignment=alignment, names={"a": a, "b": b})
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    b.requires_grad_(False)
    optimizer.step()
    torch.testing.assert_close(a.grad, torch.full((2,), 3.0), rtol=0, atol=0)
    torch.testing.assert_close(b.grad, torch.ones(2), rtol=0, atol=0)
    torch.testing.assert_close(b.detach(), torch.full((2,), 0.9), rtol=0, atol=0)
