"""The plan of a step: changes that make it stale, and references that it must not keep."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, SourceGradient
from gradguide.ops.tensors import MetadataCache, addresses_of, metadata_of
from gradguide.step.signature import Signature


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2, 2))]


def give_gradients(held: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


Groups = list[dict[str, list[nn.Parameter]]]


SIGNS = [1, 1]


def signed() -> tuple[Groups, list[nn.Parameter], Signature]:
    """Return two param groups and their signature."""
    held = parameters()
    give_gradients(held, 0)
    groups: Groups = [{"params": held[:2]}, {"params": held[2:]}]
    return groups, held, Signature(groups, SIGNS)


def test_a_plan_holds_for_other_gradients_and_other_memory() -> None:
    groups, held, signature = signed()
    give_gradients(held, 1)
    for parameter in held:
        parameter.data = parameter.data.clone()
    assert signature.gradients(groups, SIGNS) is not None


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


def parameter_transposed(groups: Groups, held: list[nn.Parameter]) -> None:
    held[2].data = held[2].data.t()


def gradient_expanded(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].grad = torch.ones(3, 1).expand(3, 4)


def gradient_negated(groups: Groups, held: list[nn.Parameter]) -> None:
    held[1].grad = torch.ones(5, dtype=torch.complex64).conj().imag


def gradient_zero(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].grad = torch._efficientzerotensor(3, 4)


def gradients_sharing_memory(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].grad = torch.ones(3, 4)
    held[2].grad = held[0].grad.view(-1)[:4].view(2, 2)


def parameter_shortened(groups: Groups, held: list[nn.Parameter]) -> None:
    held[0].grad = None
    held[0].data = held[0].data[:2]
    held[0].grad = torch.ones(2, 4)


def parameter_of_another_type(groups: Groups, held: list[nn.Parameter]) -> None:
    class Other(nn.Parameter):
        pass

    held[1].__class__ = Other


@pytest.mark.parametrize(
    "change",
    [
        replaced, moved_between_groups, added, without_gradient, of_another_precision, of_another_size, reshaped,
        gradient_transposed, sparse, parameter_transposed, gradient_expanded, gradient_negated, gradient_zero,
        gradients_sharing_memory, parameter_shortened, parameter_of_another_type,
    ],
)  # fmt: skip
def test_a_plan_is_stale_after(change: Callable[[Groups, list[nn.Parameter]], None]) -> None:
    groups, held, signature = signed()
    change(groups, held)
    assert signature.gradients(groups, SIGNS) is None


def test_a_plan_is_stale_after_a_group_maximizes() -> None:
    groups, _, signature = signed()
    assert signature.gradients(groups, SIGNS) is not None
    assert signature.gradients(groups, [1, -1]) is None


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
    for step in range(3):
        give_gradients(held, step)
        held[0].grad = torch.ones(4, 3).t()
        if step < 2:
            optimizer.step()
    held[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_no_plan_is_kept_where_a_parameter_is_a_dtensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may have gradients of different parameters, and must plan together."""

    class Sharded(nn.Parameter):
        pass

    groups, held, signature = signed()
    held[2].__class__ = Sharded
    monkeypatch.setattr("gradguide.step.signature.layout_of", lambda p: object() if p is held[2] else None)
    assert signature.gradients(groups, SIGNS) is None
    assert Signature(groups, SIGNS).gradients(groups, SIGNS) is None


def test_between_steps_no_gradient_is_kept_alive() -> None:
    held = parameters()
    source = SourceGradient({f"p{i}": torch.ones_like(p) for i, p in enumerate(held)})
    optimizer = GradGuide(
        AdamW(held),
        alignment=Alignment(source),
        names=[(f"p{i}", p) for i, p in enumerate(held)],
        direction=Direction(),
    )
    for step in range(3):
        give_gradients(held, step)
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
    optimizer = GradGuide(SGD(held, lr=0.1), direction=Direction())
    give_gradients(held, 0)
    optimizer.step()
    held[0].data = torch.ones(6, 4)
    give_gradients(held, 1)
    optimizer.step()
    assert optimizer._engine.directions[held[0]].shape == (6, 4)


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
    optimizer = GradGuide(AdamW(held, lr=0.1), direction=Direction())
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


def test_metadata_is_kept_for_the_same_tensors_alone_and_keeps_none_alive() -> None:
    cache, tensors = MetadataCache(), [torch.ones(2), torch.ones(3)]
    first = cache.of("a", tensors).metadata
    assert cache.of("a", list(tensors)).metadata is first
    tensors[0].data = torch.ones(1)
    assert list(cache.of("a", tensors).metadata.lengths) == [1, 3]  # type: ignore[union-attr]
    assert list(cache.of("a", [tensors[0], torch.ones(4)]).metadata.lengths) == [1, 4]  # type: ignore[union-attr]
    alive = weakref.ref(tensors[1])
    del tensors
    assert alive() is None


def test_metadata_of_mixed_tensors_is_none() -> None:
    found = metadata_of([torch.ones(2), torch.ones(4, 3, dtype=torch.bfloat16).t()])
    assert (list(found.lengths), found.dtype, found.plain) == ([2, 12], None, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
        lambda: torch.ones(2, 3).t(),
        lambda: torch.ones(1).expand(3),
        lambda: torch.ones(3).to_sparse(),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
    ],
)
def test_a_tensor_whose_memory_is_not_its_numbers_is_not_plain(make: Callable[[], torch.Tensor]) -> None:
    assert not metadata_of([torch.ones(2), make()]).plain


@pytest.mark.parametrize("make", [lambda: torch.ones(2, device="meta"), lambda: torch._efficientzerotensor(2)])
def test_a_tensor_without_memory_has_no_address(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    assert addresses_of([tensor], metadata_of([tensor])) is None
    assert addresses_of([torch.ones(0), torch.ones(2)], metadata_of([torch.ones(0), torch.ones(2)])) is not None


@pytest.mark.parametrize("share", [False, True])
def test_no_state_of_the_base_is_kept_alive(share: bool) -> None:
    """The state may move to the host between steps."""
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
    optimizer = GradGuide(SGD(held, lr=0.1), direction=Direction())
    give_gradients(held, 0)
    optimizer.step()
    held[0].data = held[0].data.t().contiguous()
    give_gradients(held, 1)
    optimizer.step()
    assert optimizer._engine.directions[held[0]].shape == (4, 3)
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
    before = [p.detach().clone() for p in held]
    with pytest.raises(ValueError, match=r"differ in size.*tensor 0 has shape \(2,\), expected \(3, 4\)"):
        optimizer.step()
    assert all(map(torch.equal, held, before))


def test_names_follow_parameters_that_are_replaced_after_they_changed_groups() -> None:
    held = parameters()
    names = [(f"p{i}", p) for i, p in enumerate(held)]
    source = SourceGradient({name: torch.ones_like(p) for name, p in names})
    base = SGD([{"params": held[:2]}, {"params": held[2:]}], lr=0.1)
    optimizer = GradGuide(base, alignment=Alignment(source), names=names, direction=Direction())
    give_gradients(held, 0)
    optimizer.step()
    base.param_groups[0]["params"], base.param_groups[1]["params"] = held[:1], held[1:]
    give_gradients(held, 1)
    optimizer.step()
    others = [nn.Parameter(p.detach().clone()) for p in held]
    base.param_groups[0]["params"], base.param_groups[1]["params"] = others[:1], others[1:]
    give_gradients(others, 2)
    optimizer.step()
    assert [optimizer._engine.planner.names.get(p) for p in others] == ["p0", "p1", "p2"]


def test_a_source_of_ones_own_kind_is_refreshed() -> None:
    class Counting(SourceGradient):
        refreshed = 0

        def refresh(self, parameters: object, trained: object) -> None:
            self.refreshed += 1

    held = parameters()
    source = Counting({f"p{i}": torch.ones_like(p) for i, p in enumerate(held)})
    optimizer = GradGuide(
        SGD(held, lr=0.1),
        alignment=Alignment(source),
        names=[(f"p{i}", p) for i, p in enumerate(held)],
        direction=Direction(),
    )
    for step in range(2):
        give_gradients(held, step)
        optimizer.step()
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
    for step in (1, 2, 3):
        p.grad = torch.tensor([1.0, 0.0])
        optimizer.step()
        torch.testing.assert_close(p.grad, torch.tensor([1.0, 0.0]) + 2.0**step)


def test_no_graph_grows_with_the_steps() -> None:
    """Outside of ``no_grad``, copying parameters would record each copy."""
    held = parameters()
    optimizer = GradGuide(SGD(held, lr=0.1), direction=Direction())
    for step in range(3):
        give_gradients(held, step)
        optimizer.step()
    kept = optimizer._engine.planner._plan
    assert kept is not None
    snapshots = kept[1].cache.snapshots
    assert snapshots
    assert not any(tensor.requires_grad for tensors in snapshots for tensor in tensors)
    assert not any(tensor.requires_grad for tensor in optimizer._engine.directions.values())
