"""Evaluating a live source leaves gradients, buffers, random state and hooks as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradguide import Alignment, Direction, GradGuide, ReplaySource
from tests.contract import kit
from tests.sources.replayed import guide, old, replay_of


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
