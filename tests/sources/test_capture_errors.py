"""Check the errors of captures that are not possible."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import SourceGradient

from .problems import cross_entropy, softmax_problem, split


def mean(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).mean()
    return loss


def batches(count: int = 3) -> Iterator[Tensor]:
    return (torch.ones(2, 2) for _ in range(count))


def test_no_trainable_parameter() -> None:
    model = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        SourceGradient.capture(model, batches(), mean)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        SourceGradient.capture(nn.ReLU(), batches(), mean)


@pytest.mark.parametrize("curvature", [True, False])
def test_no_batches(curvature: bool) -> None:
    with pytest.raises(ValueError, match="at least one example, found none"):
        SourceGradient.capture(nn.Linear(2, 1), [], mean, curvature=curvature)


def test_exhausted_generator() -> None:
    model, data = nn.Linear(2, 1), batches()
    SourceGradient.capture(model, data, mean)
    with pytest.raises(ValueError, match="a generator can be read only once"):
        SourceGradient.capture(model, data, mean)


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (lambda loss: loss.expand(3), r"\(3,\)"),
        (lambda loss: loss.expand(2, 1), r"\(2, 1\)"),
        (float, "float"),
        (lambda loss: (loss,), "tuple"),
        (lambda loss: None, "NoneType"),
        (lambda loss: loss.expand(0), r"\(0,\)"),
    ],
)
def test_loss_is_no_scalar(result: Any, found: str) -> None:
    with (
        pytest.raises(ValueError, match=f"scalar tensor, or one and a count, found {found} on batch 0"),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
        SourceGradient.capture(nn.Linear(2, 1), batches(), lambda m, b: result(mean(m, b)))


def test_detached_loss() -> None:
    calls = iter(range(3))
    with pytest.raises(ValueError, match="batch 1 has no gradient: it was detached"):
        SourceGradient.capture(
            nn.Linear(2, 1), batches(), lambda m, b: mean(m, b).detach() if next(calls) == 1 else mean(m, b)
        )


def test_i31_loss_that_depends_on_no_parameter() -> None:
    unrelated = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"no batch reached any of the 2 captured parameters \(weight, bias\)"):
        SourceGradient.capture(nn.Linear(2, 1), batches(), lambda m, b: unrelated * 2.0, curvature=False)
    assert unrelated.grad is None


@pytest.mark.parametrize("mode", ["training", None, True])
def test_a_mode_that_there_is_not(mode: Any) -> None:
    with pytest.raises(ValueError, match=f"mode must be one of 'eval', 'train', 'keep', found {mode!r}"):
        SourceGradient.capture(nn.Linear(2, 1), batches(), mean, mode=mode)


def test_i25_hooks_that_would_step_in_backward_are_refused() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = model.bias.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    before = model.bias.detach().clone()
    with pytest.raises(RuntimeError, match=r"bias has a hook that runs in backward.*remove the hooks"):
        SourceGradient.capture(model, batches(), mean)
    with pytest.raises(RuntimeError, match="bias has a hook"):  # not captured, but its hook would run
        SourceGradient.capture(model, batches(), mean, names=[("weight", model.weight)])
    assert torch.equal(model.bias, before)
    handle.remove()
    SourceGradient.capture(model, batches(), mean)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_loss_not_finite_names_the_batch(bad: float) -> None:
    data = [torch.ones(2, 2), torch.ones(2, 2), torch.full((2, 2), bad)]
    with pytest.raises(ValueError, match=r"batch 2 has a loss of (nan|inf|-inf) and gradients .*not finite"):
        SourceGradient.capture(nn.Linear(2, 1), data, lambda m, b: m(b).abs().sum())


def test_gradient_not_finite_under_a_finite_loss() -> None:
    model = nn.Linear(2, 1, bias=False)
    with pytest.raises(ValueError, match=r"batch 0 has a loss of 0\.0 and gradients that are not finite"):
        # The square root has no finite derivative at zero.
        SourceGradient.capture(model, batches(), lambda m, b: m(b * 0.0).sqrt().mean())


def test_sampled_loss_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"scalar tensor, or one and a count, found \(2, 1\) on batch 0"):
        SourceGradient.capture(nn.Linear(2, 1), batches(), mean, curvature=lambda m, b: m(b))
    with pytest.raises(ValueError, match="batch 0 has a loss of nan"):
        SourceGradient.capture(nn.Linear(2, 1), batches(), mean, curvature=lambda m, b: mean(m, b) * torch.nan)


@pytest.mark.parametrize("count", [2, 7])
def test_curvature_of_one_batch(count: int) -> None:
    model, x, y = softmax_problem(count)
    with pytest.raises(ValueError, match=rf"at least two batches, found one of {count} examples.*curvature=False"):
        SourceGradient.capture(model, [(x, y)], cross_entropy)
    assert not SourceGradient.capture(model, [(x, y)], cross_entropy, curvature=False).curvature


def test_curvature_of_one_example_is_its_square() -> None:
    model, x, y = softmax_problem(1)
    source = SourceGradient.capture(model, split(x, y, [1]), cross_entropy, dtype=torch.float64)
    row = source.row(source.names(), [p.detach() for p in model.parameters()])
    assert row.offset is not None
    assert row.scale is not None
    for gradient, square in zip(row.offset, row.scale, strict=True):
        torch.testing.assert_close(square, gradient.square(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16, torch.complex64])
def test_dtype_that_cannot_hold_the_rows(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"torch.float32, torch.bfloat16, torch.float64, found {dtype}"):
        SourceGradient.capture(nn.Linear(2, 1), batches(), mean, dtype=dtype)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("a sentence", "found str"),
        (3, "found int"),
        (torch.tensor(1.0), "found Tensor"),
        ({"text": ["a", "b"]}, "found dict without"),
        ({"flag": torch.tensor(True)}, "found dict without"),
        (["a", "b"], "found list without"),
        ((), "found tuple without"),
    ],
)
def test_batch_that_cannot_be_counted(batch: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SourceGradient.capture(nn.Linear(2, 1), [batch], lambda m, b: mean(m, torch.ones(2, 2)))
