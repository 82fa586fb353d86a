"""The signature of a plan: changes of groups, parameters and gradients that make it stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradguide.step.signature import Signature
from tests.step.held import give_gradients, parameters

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


def test_no_plan_is_kept_where_a_parameter_is_a_dtensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may have gradients of different parameters, and must plan together."""

    class Sharded(nn.Parameter):
        pass

    groups, held, signature = signed()
    held[2].__class__ = Sharded
    monkeypatch.setattr("gradguide.step.signature.layout_of", lambda p: object() if p is held[2] else None)
    assert signature.gradients(groups, SIGNS) is None
    assert Signature(groups, SIGNS).gradients(groups, SIGNS) is None
