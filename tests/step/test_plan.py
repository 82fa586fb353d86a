"""The plan of a step: parameters and state that change between steps, and references that it must not keep."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, SourceGradient
from tests.step.held import give_gradients, named, parameters, step


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has gradients of the parameter's dtype only"
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_gradient_of_integers_is_refused_by_its_dtype(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = GradGuide(SGD([parameter], lr=0.1), direction=Direction())
    parameter.grad_dtype = None  # any dtype
    parameter.grad = torch.ones(3, dtype=dtype)
    with pytest.raises(ValueError, match=f"the gradient is of {dtype}"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(3))


def test_a_gradient_that_becomes_sparse_beside_one_that_is_not_contiguous_is_refused() -> None:
    held = parameters()
    optimizer = GradGuide(SGD(held, lr=0.1), direction=Direction())
    for seed in range(3):
        give_gradients(held, seed)
        held[0].grad = torch.ones(4, 3).t()
        if seed < 2:
            optimizer.step()
    held[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_between_steps_no_gradient_is_kept_alive() -> None:
    held = parameters()
    source = SourceGradient({name: torch.ones_like(p) for name, p in named(held)})
    optimizer = GradGuide(
        AdamW(held),
        alignment=Alignment(source),
        names=named(held),
        direction=Direction(),
    )
    for seed in range(3):
        give_gradients(held, seed)
        alive = [weakref.ref(p.grad) for p in held if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("share", [False, True])
def test_parameters_whose_data_change_between_steps_are_guided_on(share: bool) -> None:
    """This happens when a model is cast, or its parameters move to other memory."""
    runs = []
    for moving in (False, True):
        held = parameters()
        base = AdamW(held, lr=0.1)
        optimizer = GradGuide(base, direction=Direction(share_momentum=share), magnitude=Magnitude(max_update=None))
        for seed in range(4):
            if moving and seed == 2:
                for parameter in held:
                    parameter.data = parameter.data.clone()
                    if share:
                        base.state[parameter]["exp_avg"] = base.state[parameter]["exp_avg"].clone()
            step(optimizer, held, seed)
        runs.append(torch.cat([p.detach().reshape(-1) for p in held]))
    assert torch.equal(*runs)


def test_a_parameter_that_grows_gets_a_direction_of_its_size() -> None:
    held = parameters()
    optimizer = GradGuide(SGD(held, lr=0.1), direction=Direction())
    step(optimizer, held, 0)
    held[0].data = torch.ones(6, 4)
    step(optimizer, held, 1)
    assert optimizer._engine.directions[held[0]].shape == (6, 4)


def test_momentum_that_is_forgotten_is_not_read_again() -> None:
    held = parameters()
    optimizer = GradGuide(AdamW(held), direction=Direction(share_momentum=True))
    for seed in range(2):
        step(optimizer, held, seed)
    optimizer.base.state.clear()
    step(optimizer, held, 2)
    assert optimizer.metrics()["direction_cosine"] == 0.0


def test_a_copy_goes_on_by_itself() -> None:
    held = parameters()
    optimizer = GradGuide(AdamW(held, lr=0.1), direction=Direction())
    step(optimizer, held, 0)
    other = copy.deepcopy(optimizer)
    theirs = other.param_groups[0]["params"]
    before = [p.detach().clone() for p in held]
    step(other, theirs, 1)
    assert all(map(torch.equal, held, before))
    step(optimizer, held, 1)
    assert all(map(torch.equal, held, theirs))


@pytest.mark.parametrize("share", [False, True])
def test_no_state_of_the_base_is_kept_alive(share: bool) -> None:
    """The state may move to the host between steps."""
    held = parameters()
    optimizer = GradGuide(AdamW(held), direction=Direction(share_momentum=share))
    for seed in range(3):
        step(optimizer, held, seed)
        alive = [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
        for state in optimizer.state.values():
            for name in state:
                state[name] = state[name].clone()
        gc.collect()
        assert not any(reference() is not None for reference in alive)


def test_a_parameter_that_is_transposed_gets_a_direction_of_its_shape() -> None:
    held = parameters()
    optimizer = GradGuide(SGD(held, lr=0.1), direction=Direction())
    step(optimizer, held, 0)
    held[0].data = held[0].data.t().contiguous()
    step(optimizer, held, 1)
    assert optimizer._engine.directions[held[0]].shape == (4, 3)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("share", [False, True])
def test_parameters_and_moments_may_be_pruned_together(share: bool) -> None:
    held = parameters()
    optimizer = GradGuide(AdamW(held), direction=Direction(share_momentum=share))
    step(optimizer, held, 0)
    for tensor in (held[0], *optimizer.state[held[0]].values()):
        if tensor.dim():
            tensor.data = tensor.data[:2].clone()
    step(optimizer, held, 1)
    assert optimizer.metrics()["grad_norm"] > 0


def test_moments_of_another_size_than_their_parameter_are_refused_before_memory_is_read() -> None:
    held = parameters()
    optimizer = GradGuide(AdamW(held), direction=Direction(share_momentum=True))
    step(optimizer, held, 0)
    optimizer.state[held[0]]["exp_avg"].data = torch.ones(2)
    give_gradients(held, 1)
    before = [p.detach().clone() for p in held]
    with pytest.raises(ValueError, match=r"differ in size.*tensor 0 has shape \(2,\), expected \(3, 4\)"):
        optimizer.step()
    assert all(map(torch.equal, held, before))


def test_names_follow_parameters_that_are_replaced_after_they_changed_groups() -> None:
    held = parameters()
    source = SourceGradient({name: torch.ones_like(p) for name, p in named(held)})
    base = SGD([{"params": held[:2]}, {"params": held[2:]}], lr=0.1)
    optimizer = GradGuide(base, alignment=Alignment(source), names=named(held), direction=Direction())
    step(optimizer, held, 0)
    base.param_groups[0]["params"], base.param_groups[1]["params"] = held[:1], held[1:]
    step(optimizer, held, 1)
    others = [nn.Parameter(p.detach().clone()) for p in held]
    base.param_groups[0]["params"], base.param_groups[1]["params"] = others[:1], others[1:]
    step(optimizer, others, 2)
    assert [optimizer._engine.planner.names.get(p) for p in others] == ["p0", "p1", "p2"]


def test_a_source_of_ones_own_kind_is_refreshed() -> None:
    class Counting(SourceGradient):
        refreshed = 0

        def refresh(self, parameters: object, trained: object) -> None:
            self.refreshed += 1

    held = parameters()
    source = Counting({name: torch.ones_like(p) for name, p in named(held)})
    optimizer = GradGuide(
        SGD(held, lr=0.1),
        alignment=Alignment(source),
        names=named(held),
        direction=Direction(),
    )
    for seed in range(2):
        step(optimizer, held, seed)
    assert source.refreshed == 2


def test_alignment_and_regularizer_have_their_own_sources() -> None:
    p = nn.Parameter(torch.ones(3))
    source, other = (SourceGradient({"p": row}) for row in torch.eye(3)[:2])
    optimizer = GradGuide(
        SGD([p], lr=0.1),
        direction=None,
        magnitude=None,
        alignment=Alignment(source, weight=1.0, project=False),
        regularizer=Regularizer(alignment=0.1, source=other, warmup=0),
        names=[("p", p)],
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p * torch.tensor([2.0, 3.0, 6.0])).sum()  # no curvature, so the regularizer adds nothing
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        assert p.grad is not None
        torch.testing.assert_close(p.grad, torch.tensor([2.0, 3.0, 6.0]) + torch.eye(3)[0])


def test_a_stored_source_that_its_subclass_refreshes_is_read_at_each_step() -> None:
    class Growing(SourceGradient):
        def refresh(self, parameters: object, trained: object) -> None:
            self._tables["gradient"] = {name: 2.0 * row for name, row in self._tables["gradient"].items()}

    p = nn.Parameter(torch.ones(2))
    alignment = Alignment(Growing({"p": torch.ones(2)}), weight=1.0, project=False)
    optimizer = GradGuide(SGD([p], lr=0.1), direction=None, magnitude=None, alignment=alignment, names=[("p", p)])
    for number in (1, 2, 3):
        p.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
        torch.testing.assert_close(p.grad, torch.tensor([1.0, 0.0]) + 2.0**number)


def test_no_graph_grows_with_the_steps() -> None:
    """Outside of ``no_grad``, copying parameters would record each copy."""
    held = parameters()
    optimizer = GradGuide(SGD(held, lr=0.1), direction=Direction())
    for seed in range(3):
        step(optimizer, held, seed)
    kept = optimizer._engine.planner._plan
    assert kept is not None
    snapshots = kept[1].cache.snapshots
    assert snapshots
    assert not any(tensor.requires_grad for tensors in snapshots for tensor in tensors)
    assert not any(tensor.requires_grad for tensor in optimizer._engine.directions.values())
