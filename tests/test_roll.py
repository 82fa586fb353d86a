"""What a step takes over from the one before it, and what makes it look anew."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.buckets import Bucket, gather, labeller
from gradguide.ops.tensors import Interned, Tensors, located
from gradguide.roll import Roll


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2, 2))]


def give_gradients(held: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


Groups = list[dict[str, list[nn.Parameter]]]


def called() -> tuple[Groups, list[nn.Parameter], Roll]:
    """Two param groups whose buckets a roll has taken down."""
    held = parameters()
    give_gradients(held, 0)
    groups: Groups = [{"params": held[:2]}, {"params": held[2:]}]
    return groups, held, Roll(groups, gathered(groups))


def gathered(groups: Groups) -> list[Bucket]:
    return gather(groups, labeller("group", {}), {}, frozenset(), {}, [1] * len(groups))


def test_a_bucket_called_again_is_as_gathered_anew() -> None:
    groups, held, roll = called()
    give_gradients(held, 1)
    found, wanted = roll.call(groups), gathered(groups)
    assert found is not None
    assert found == wanted
    assert [id(g) for bucket in found for g in bucket.gradients] == [id(p.grad) for p in held]


def replaced(groups: Groups, held: list[nn.Parameter]) -> None:
    groups[0]["params"][1] = other = nn.Parameter(held[1].detach().clone())
    other.grad = torch.ones_like(other)


def moved_between_groups(groups: Groups, held: list[nn.Parameter]) -> None:
    groups[0]["params"], groups[1]["params"] = held[:1], held[1:]


def added(groups: Groups, held: list[nn.Parameter]) -> None:
    groups.append({"params": [nn.Parameter(torch.ones(1))]})


def without_gradient(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].grad = None


def of_another_precision(groups: Groups, held: list[nn.Parameter]) -> None:
    for parameter in held:
        parameter.data = parameter.data.double()
    give_gradients(held, 1)


def of_another_size(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].data = torch.ones(6, 4)
    held[0].grad = torch.ones(6, 4)


def gradient_transposed(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].grad = torch.ones(4, 3).t()


def reshaped(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].data = held[0].data.view(4, 3)
    held[0].grad = torch.ones(4, 3)


def sparse(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].grad = torch.ones(3, 4).to_sparse()


@pytest.mark.parametrize(
    "change",
    [
        replaced, moved_between_groups, added, without_gradient, of_another_precision, of_another_size, reshaped,
        gradient_transposed, sparse,
    ],
)  # fmt: skip
def test_whatever_changes_is_looked_at_anew(change: Callable[[Groups, list[nn.Parameter]], None]) -> None:
    groups, held, roll = called()
    change(groups, held)
    assert roll.call(groups) is None


def test_a_gradient_that_becomes_sparse_beside_one_that_is_not_contiguous_is_refused() -> None:
    held = parameters()
    optimizer = GradGuide(SGD(held, lr=0.1))
    for step in range(3):
        give_gradients(held, step)
        held[0].grad = torch.ones(4, 3).t()
        if step < 2:
            optimizer.step()
    held[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_nothing_is_taken_over_where_a_parameter_lies_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may have gradients of different parameters, but must look at them together."""
    groups, held, roll = called()
    monkeypatch.setattr("gradguide.roll.layout_of", lambda p: object() if p is held[2] else None)
    other = Roll(groups, gathered(groups))
    assert roll.call(groups) is not None
    assert other.call(groups) is None


def test_between_steps_no_gradient_is_kept_alive() -> None:
    held = parameters()
    source = SourceGradient({f"p{i}": torch.ones_like(p) for i, p in enumerate(held)})
    optimizer = GradGuide(AdamW(held), alignment=Alignment(source), names=[(f"p{i}", p) for i, p in enumerate(held)])
    for step in range(3):
        give_gradients(held, step)
        alive = [weakref.ref(p.grad) for p in held if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("share", [False, True])
def test_parameters_whose_data_change_between_steps_are_guided_on(share: bool) -> None:
    """As when a model is cast, or its parameters are laid into other memory."""
    runs = []
    for moving in (False, True):
        held = parameters()
        base = AdamW(held, lr=0.1)
        optimizer = GradGuide(base, direction=Direction(share_momentum=share), magnitude=Magnitude(max_update=None))
        for step in range(4):
            if moving and step == 2:
                for parameter in held:
                    parameter.data = parameter.data.clone()
                    if share:
                        base.state[parameter]["exp_avg"] = base.state[parameter]["exp_avg"].clone()
            give_gradients(held, step)
            optimizer.step()
        runs.append(torch.cat([p.detach().reshape(-1) for p in held]))
    assert torch.equal(*runs)


def test_a_parameter_that_grows_gets_a_direction_of_its_size() -> None:
    held = parameters()
    optimizer = GradGuide(SGD(held, lr=0.1))
    give_gradients(held, 0)
    optimizer.step()
    held[0].data = torch.ones(6, 4)
    give_gradients(held, 1)
    optimizer.step()
    assert optimizer._guidance.directions[held[0]].shape == (6, 4)


def test_momentum_that_is_forgotten_is_not_read_again() -> None:
    held = parameters()
    optimizer = GradGuide(AdamW(held), direction=Direction(share_momentum=True))
    for step in range(2):
        give_gradients(held, step)
        optimizer.step()
    optimizer.base.state.clear()
    give_gradients(held, 2)
    optimizer.step()
    assert optimizer.metrics()["direction_cosine"] == 0.0


def test_a_copy_goes_on_by_itself() -> None:
    held = parameters()
    optimizer = GradGuide(AdamW(held, lr=0.1))
    give_gradients(held, 0)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    theirs = other.param_groups[0]["params"]
    before = [p.detach().clone() for p in held]
    give_gradients(theirs, 1)
    other.step()
    assert all(map(torch.equal, held, before))
    give_gradients(held, 1)
    optimizer.step()
    assert all(map(torch.equal, held, theirs))


def test_notes_are_kept_for_the_same_tensors_alone_and_keep_none_alive() -> None:
    interned, tensors = Interned(), [torch.ones(2), torch.ones(3)]
    first = interned.of("a", tensors)
    assert interned.of("a", list(tensors)).note is first.note
    assert interned.known("a", tensors) is not None
    assert interned.known("b", tensors) is None
    assert interned.of("a", [tensors[0], torch.ones(3)]).note is not first.note
    alive = weakref.ref(tensors[1])
    del tensors, first
    assert alive() is None


def test_facts_of_what_is_mixed_are_none() -> None:
    facts, addresses = located([torch.ones(2), torch.ones(4, 3, dtype=torch.bfloat16).t()])
    assert (list(facts.lengths), facts.dtype, facts.plain) == ([2, 12], None, False)
    assert len(addresses) == 2


@pytest.mark.parametrize("change", ["moved", "cast", "shorter"])
def test_other_data_have_other_facts(change: str) -> None:
    tensors = Tensors([torch.ones(4), torch.ones(3)])
    before = located(tensors)
    assert located(tensors)[0] is before[0]
    data = {"moved": torch.ones(4), "cast": torch.ones(4, dtype=torch.bfloat16), "shorter": torch.ones(2)}[change]
    tensors[0].data = data
    facts, addresses = located(tensors)
    assert addresses[0] == data.data_ptr() != before[1][0]
    assert list(facts.lengths) == [data.numel(), 3]
    assert facts.dtype == (None if change == "cast" else torch.float32)


def test_a_copied_list_has_no_note() -> None:
    tensors = Tensors([torch.ones(4)])
    located(tensors)
    assert copy.deepcopy(tensors).note.facts is None


@pytest.mark.parametrize("share", [False, True])
def test_no_state_of_the_base_is_kept_alive(share: bool) -> None:
    """As when it is moved to the host between steps."""
    held = parameters()
    optimizer = GradGuide(AdamW(held), direction=Direction(share_momentum=share))
    for step in range(3):
        give_gradients(held, step)
        optimizer.step()
        alive = [weakref.ref(value) for state in optimizer.state.values() for value in state.values()]
        for state in optimizer.state.values():
            for name in state:
                state[name] = state[name].clone()
        gc.collect()
        assert not any(reference() is not None for reference in alive)


def test_a_parameter_that_is_transposed_gets_a_direction_of_its_shape() -> None:
    held = parameters()
    optimizer = GradGuide(SGD(held, lr=0.1))
    give_gradients(held, 0)
    optimizer.step()
    held[0].data = held[0].data.t().contiguous()
    give_gradients(held, 1)
    optimizer.step()
    assert optimizer._guidance.directions[held[0]].shape == (4, 3)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("share", [False, True])
def test_parameters_and_moments_may_be_pruned_together(share: bool) -> None:
    held = parameters()
    optimizer = GradGuide(AdamW(held), direction=Direction(share_momentum=share))
    give_gradients(held, 0)
    optimizer.step()
    for tensor in (held[0], *optimizer.state[held[0]].values()):
        if tensor.dim():
            tensor.data = tensor.data[:2].clone()
    give_gradients(held, 1)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] > 0


def test_moments_of_another_size_than_their_parameter_are_refused_before_memory_is_read() -> None:
    held = parameters()
    optimizer = GradGuide(AdamW(held), direction=Direction(share_momentum=True))
    give_gradients(held, 0)
    optimizer.step()
    optimizer.state[held[0]]["exp_avg"].data = torch.ones(2)
    give_gradients(held, 1)
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()


def test_names_follow_parameters_that_are_replaced_after_they_changed_groups() -> None:
    held = parameters()
    names = [(f"p{i}", p) for i, p in enumerate(held)]
    source = SourceGradient({name: torch.ones_like(p) for name, p in names})
    base = SGD([{"params": held[:2]}, {"params": held[2:]}], lr=0.1)
    optimizer = GradGuide(base, alignment=Alignment(source), names=names)
    give_gradients(held, 0)
    optimizer.step()
    base.param_groups[0]["params"], base.param_groups[1]["params"] = held[:1], held[1:]
    give_gradients(held, 1)
    optimizer.step()
    others = [nn.Parameter(p.detach().clone()) for p in held]
    base.param_groups[0]["params"], base.param_groups[1]["params"] = others[:1], others[1:]
    give_gradients(others, 2)
    optimizer.step()
    assert [optimizer._guidance.surveyor.names.get(p) for p in others] == ["p0", "p1", "p2"]


def test_a_source_of_ones_own_kind_is_refreshed() -> None:
    class Counting(SourceGradient):
        refreshed = 0

        def refresh(self, parameters: object, trained: object) -> None:
            self.refreshed += 1

    held = parameters()
    source = Counting({f"p{i}": torch.ones_like(p) for i, p in enumerate(held)})
    optimizer = GradGuide(
        SGD(held, lr=0.1), alignment=Alignment(source), names=[(f"p{i}", p) for i, p in enumerate(held)]
    )
    for step in range(2):
        give_gradients(held, step)
        optimizer.step()
    assert source.refreshed == 2
