"""Tensors whose memory is not their numbers, memory that changes between steps, and writes that autograd sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, AdamW
from torch.utils._pytree import tree_map

from gradguide import Direction, GradGuide, Magnitude
from tests.contract.backends import BACKENDS_AT_LENGTH


class Wrapped(Tensor):
    """A wrapper subclass, whose own memory is never written."""

    held: Any

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.held = inner

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inner = tree_map(lambda x: x.held if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        found = func(*inner[0], **inner[1])
        if func is torch.ops.aten.detach.default:
            return Wrapped(found)
        return args[0] if func._schema.is_mutable and found is not None else found


def bounded(value: Tensor, gradient: Tensor, backend: str, lr: float = 10.0) -> nn.Parameter:
    """A parameter after a step whose update may be at most 0.05 of its length."""
    parameter = nn.Parameter(value)
    optimizer = GradGuide(SGD([parameter], lr=lr, foreach=False), backend=backend, direction=Direction())
    parameter.grad = gradient
    optimizer.step()
    return parameter


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i29_a_wrapper_subclass_is_guided_as_the_tensor_it_wraps(backend: str) -> None:
    found: Any = bounded(Wrapped(torch.ones(64)), torch.ones(64), backend)
    wanted = bounded(torch.ones(64), torch.ones(64), backend)
    torch.testing.assert_close(found.held, wanted.detach())
    assert float((found.held - 1).norm()) == pytest.approx(0.4, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i29_a_negated_gradient_is_read_with_its_sign(backend: str) -> None:
    negated = torch.tensor([1 + 2j, 3 - 1j]).conj().imag
    assert negated.is_neg()
    found = bounded(torch.ones(2), negated, backend, lr=0.01)
    wanted = bounded(torch.ones(2), torch.tensor([-2.0, 1.0]), backend, lr=0.01)
    torch.testing.assert_close(found.detach(), wanted.detach())


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i29_an_efficient_zero_gradient_is_a_zero_gradient(backend: str) -> None:
    parameter = bounded(torch.ones(4), torch._efficientzerotensor(4), backend)
    assert torch.equal(parameter, torch.ones(4))


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i29_an_expanded_gradient_is_guided_as_its_copy(backend: str) -> None:
    wanted = bounded(torch.ones(2, 3), torch.full((2, 3), 2.0), backend, lr=0.01)
    found = bounded(torch.ones(2, 3), torch.full((2, 1), 2.0).expand(2, 3), backend, lr=0.01)
    torch.testing.assert_close(found.detach(), wanted.detach())


def test_i29_fake_and_meta_tensors_are_refused_with_a_reason() -> None:
    with FakeTensorMode():
        model = nn.Linear(3, 3)
        base = AdamW(model.parameters())
        model(torch.randn(2, 3)).sum().backward()
        base.step()
        with pytest.raises(RuntimeError, match="is a fake tensor"):
            GradGuide(base, direction=Direction()).step()
    with pytest.raises(RuntimeError, match="meta device"):
        bounded(torch.ones(3, device="meta"), torch.ones(3, device="meta"), "foreach")


def test_i29_a_gradient_that_two_parameters_share_is_refused_and_nothing_changes() -> None:
    held = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = GradGuide(SGD(held, lr=0.1), names=[("a", held[0]), ("b", held[1])], direction=Direction())
    for p in held:
        p.grad = torch.ones(3)
    optimizer.step()
    before = [p.detach().clone() for p in held]
    held[1].grad = held[0].grad = torch.ones(3)
    with pytest.raises(ValueError, match="a and b share one gradient tensor"):
        optimizer.step()
    assert all(map(torch.equal, held, before))


def transposed(p: nn.Parameter) -> None:
    p.data = p.data.t()


def made_contiguous_elsewhere(p: nn.Parameter) -> None:
    p.data = p.data.clone()


def made_float64(p: nn.Parameter) -> None:
    p.data = p.data.double()


def made_bfloat16(p: nn.Parameter) -> None:
    p.data = p.data.bfloat16()


def reshaped(p: nn.Parameter) -> None:
    p.data = p.data.reshape(2, 8)


def grown(p: nn.Parameter) -> None:
    p.data = torch.cat([p.data, p.data])


def strided(p: nn.Parameter) -> None:
    p.data = torch.stack([p.data, p.data], dim=2)[..., 0]


CHANGES = [transposed, made_contiguous_elsewhere, made_float64, made_bfloat16, reshaped, grown, strided]


@pytest.mark.parametrize("clear", [True, False], ids=["gradients cleared", "gradients kept"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i30_after_any_change_of_a_parameter_a_step_is_that_of_a_new_optimizer(
    backend: str, change: Callable[[nn.Parameter], None], clear: bool
) -> None:
    torch.manual_seed(0)
    held = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3))]
    options: dict[str, Any] = {"direction": None, "magnitude": Magnitude(), "backend": backend}
    optimizer = GradGuide(SGD(held, lr=0.5), **options)
    for p in held:
        p.grad = torch.randn_like(p)
    optimizer.step()
    change(held[0])
    if clear:
        optimizer.zero_grad()
    others = copy.deepcopy(held)
    other = GradGuide(SGD(others, lr=0.5), **{**options, "backend": "foreach"})
    for p, q in zip(held, others, strict=True):
        p.grad = torch.randn(p.shape, dtype=p.dtype)
        q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    # The magnitude is one number for all tensors, so one bfloat16 tensor's rounding (2**-8) reaches each of them.
    rtol, atol = (1e-2, 1e-2) if change is made_bfloat16 else (1e-5, 1e-6)
    for p, q in zip(held, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i30_weights_swapped_for_their_average_and_back_train_on(backend: str) -> None:
    """As an average of weights is evaluated: data swapped away and back between steps."""
    runs = []
    for swaps in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5, 3))
        optimizer = GradGuide(AdamW([p], lr=0.1), backend=backend, direction=Direction())
        for _ in range(4):
            p.grad = torch.randn_like(p)
            optimizer.step()
            if swaps:
                trained, p.data = p.data, torch.zeros(5, 3)
                p.data = trained
        runs.append(p.detach().clone())
    assert torch.equal(*runs)


@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i34_every_write_raises_the_version(backend: str) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = GradGuide(SGD([p], lr=10.0), direction=Direction(), magnitude=Magnitude(max_norm=0.1), backend=backend)
    p.grad = torch.ones(4)
    versions = p._version, p.grad._version
    optimizer.step()
    assert p.grad._version > versions[1]
    assert p._version > versions[0]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS_AT_LENGTH)
def test_i34_autograd_notices_a_gradient_with_a_graph_that_was_changed(backend: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    p = nn.Parameter(torch.zeros(3))
    optimizer = GradGuide(
        SGD([p], lr=0.1), direction=None, magnitude=Magnitude(max_norm=0.1, max_update=None), backend=backend
    )
    (p * x**2).sum().backward(create_graph=True)
    assert p.grad is not None
    matched = (p.grad * p.grad).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(matched, x)


def test_i34_a_differentiable_base_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="differentiable=True"):
        GradGuide(SGD([p], lr=0.1, differentiable=True), direction=Direction())
    optimizer = GradGuide(SGD([p], lr=0.1), direction=Direction())
    with pytest.raises(ValueError, match="differentiable=True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "differentiable": True})
    assert len(optimizer.param_groups) == 1
