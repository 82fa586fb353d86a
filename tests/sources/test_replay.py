"""Replay source batches for live source gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradguide import Alignment, Direction, GradGuide, Regularizer, ReplaySource
from tests.contract import kit


def old(step: int) -> tuple[Tensor, Tensor]:
    """Return a batch of the source task, distinct from those of the target."""
    return kit.batch(500 + step)


def guide(model: nn.Module, source: Any, **options: Any) -> GradGuide:
    options = {"direction": None, "magnitude": None} | options
    alignment = Alignment(source, on="gradient", **options.pop("alignment", {}))
    return GradGuide(kit.sgd(model.parameters()), alignment=alignment, names=model.named_parameters(), **options)


def replay_of(model: nn.Module, every: int = 1, count: int = 3) -> ReplaySource:
    return ReplaySource([old(i) for i in range(count)], lambda batch: kit.loss_of(model, batch), every)


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
    calls: list[int] = []

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(len(calls))
        return kit.loss_of(model, batch)

    def closure() -> Tensor:
        model.zero_grad()
        found = kit.loss_of(model, kit.batch(0))
        found.backward()
        return found

    source = ReplaySource([old(0), old(1), old(2)], loss, every=2)
    optimizer = guide(model, source, regularizer=Regularizer(alignment=0.1, source=source))
    for _ in range(4):
        optimizer.step(closure)
    assert len(calls) == 2, "at steps 0 and 2"


def test_between_evaluations_the_last_answer_stands() -> None:
    model = kit.net()
    calls: list[int] = []

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(len(calls))
        return kit.loss_of(model, batch)

    source = ReplaySource([old(0), old(1)], loss, every=3)
    optimizer = guide(model, source)
    names = [name for name, _ in model.named_parameters()]
    answers = []
    for step in range(7):
        kit.train(model, optimizer, [step])
        answers.append(flat(source.row(names, list(model.parameters())).tensors))
    assert len(calls) == 3, "at steps 0, 3 and 6"
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


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.new, self.old = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, head: str = "new") -> Tensor:
        found: Tensor = getattr(self, head)(self.body(x))
        return found


def test_it_leaves_no_trace_but_its_answer() -> None:
    """Gradients (also of other parameters), batch statistics and random state are unchanged."""
    model, plain = Noisy(), Noisy()
    for each in (model, plain):
        each.old.requires_grad_(False)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0], "old") + model(batch[0], "new"), batch[1])

    source = ReplaySource([old(0)], loss)
    named = [(name, p) for name, p in model.named_parameters() if name.startswith("body")]
    optimizer = GradGuide(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        direction=Direction(damping=0.0),
        magnitude=None,
        alignment=Alignment(source, project=False),
        names=named,
    )
    for each in (model, plain):
        torch.manual_seed(4)
        kit.loss_of(each, kit.batch(0)).backward()
    state = torch.get_rng_state()
    held = [p.grad for p in model.parameters()]
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
    kit.assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    kit.assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = kit.net(), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.net(x))
        return found


def test_buffers_of_a_compiled_model_are_those_of_training_alone() -> None:
    """Compiled code calls no hooks on modules, so the model must be known."""
    model, plain = Normalized(), Normalized()
    model.compile(backend="eager")
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = GradGuide(base, alignment=Alignment(replay_of(model)), names=model)
    for step in range(3):
        kit.train(model, optimizer, [step])
        kit.loss_of(plain, kit.batch(step))
    kit.assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


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
    explode = [False, True]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return kit.loss_of(model, batch) * (float("inf") if explode.pop(0) else 1.0)

    scaler.scale(torch.zeros(()))  # initialises its scale
    source = ReplaySource([old(0)], loss, scaler=scaler)
    named = dict(model.named_parameters())
    source.refresh(named, list(named.values()))
    first = flat(source.row(list(named), list(named.values())).tensors)
    torch.testing.assert_close(first, gradient_of(model, old(0)))
    source.refresh(named, list(named.values()))
    assert torch.equal(flat(source.row(list(named), list(named.values())).tensors), first)


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

    named = dict(model.named_parameters())
    source = ReplaySource([old(0)], loss, scaler=scaler)
    source.refresh(named, list(named.values()))
    assert scales == [2.0**16, 2.0**15, 2.0**14, 2.0**13]
    torch.testing.assert_close(flat(source.row(list(named), list(named.values())).tensors), gradient_of(model, old(0)))
    for _ in range(2500):
        source.refresh(named, list(named.values()))
    assert 2.0**12 < scales[-1] < 2.0**13, "it grows again, and is halved again"
    assert len(scales) == 4 + 2500


def test_until_a_gradient_is_finite_every_step_evaluates() -> None:
    """The first one cannot be replaced by an earlier one, so the step is skipped."""
    model = kit.net()
    calls: list[int] = []

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(len(calls))
        return kit.loss_of(model, batch) * (float("inf") if len(calls) in (1, 2, 4) else 1.0)

    optimizer = guide(model, ReplaySource([old(0)], loss, every=4))
    evaluations = []
    for step in range(9):
        kit.train(model, optimizer, [step])
        evaluations.append(len(calls))
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


class LossOf:
    """The loss of a batch. A deep copy evaluates the copied model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return kit.loss_of(self.model, batch)


def test_a_copy_starts_again_at_the_first_batch_and_steps_by_itself() -> None:
    model = kit.net()
    source = ReplaySource([old(i) for i in range(3)], LossOf(model))
    optimizer = guide(model, source, alignment={"weight": 1.0, "project": False})
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
        ([], lambda model: lambda batch: kit.loss_of(model, batch), "found none; a generator can be read only once"),
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_parameters_of_another_optimizer_keep_their_gradients(reentrant: bool) -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4), nn.Linear(4, 1)

    def loss(x: Tensor) -> Tensor:
        inner = checkpoint(body, x, use_reentrant=True) if reentrant else body(x)
        value: Tensor = head(inner).square().mean()
        return value

    batch = torch.randn(3, 4, requires_grad=True)
    optimizer = GradGuide(
        torch.optim.SGD(body.parameters(), lr=0.1),
        alignment=Alignment(ReplaySource([batch], loss)),
        names=body,
        direction=Direction(),
    )
    loss(torch.ones(2, 4, requires_grad=True)).backward()
    held = {p: (p.grad, p.grad.clone()) for p in head.parameters() if p.grad is not None}
    optimizer.step()
    assert len(held) == 2
    for p, (gradient, value) in held.items():
        assert p.grad is gradient
        assert torch.equal(gradient, value)
    assert batch.grad is None
    assert optimizer.metrics()["source_cosine"] == optimizer.metrics()["source_cosine"]  # not NaN


def test_i25_hooks_that_a_replay_would_set_off_are_refused() -> None:
    model = kit.net()
    optimizer = guide(model, replay_of(model))
    kit.loss_of(model, kit.batch(0)).backward()
    calls: list[Tensor] = []
    handle = next(model.parameters()).register_post_accumulate_grad_hook(calls.append)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"0\.weight has a hook that runs in backward"):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert calls == []
    handle.remove()
    optimizer.step()


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
