"""Check that a capture restores the model's state, also after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import SourceGradient


def model_of_all_sorts() -> nn.Sequential:
    """Return a model with batch norm, dropout, a frozen layer, mixed modes, and gradients on some parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5)),
        nn.Linear(6, 1),
    )
    model[1](torch.randn(16, 6))
    model.train()
    model[1].eval()
    model.get_submodule("2.2").eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.randn(6, 4)
    model[3].bias.grad = torch.zeros(1)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "parameters": [p.detach().clone() for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "grad_identity": [id(p.grad) for p in model.parameters()],
        "grad_values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "rng": torch.get_rng_state(),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, wanted)
    if isinstance(wanted, (list, dict)):
        items = wanted.items() if isinstance(wanted, dict) else enumerate(wanted)
        return len(found) == len(wanted) and all(same(found[key], value) for key, value in items)
    return bool(found == wanted)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    assert not any(module.training for module in model.modules())
    # A loss may draw random numbers.
    loss: Tensor = model(batch + torch.randn_like(batch)).square().mean()
    return loss


def batches() -> Iterator[Tensor]:
    for size in (3, 4, 2):
        yield torch.randn(size, 4)


def failing_loss(model: nn.Module, batch: Tensor) -> Tensor:
    if batch.shape[0] == 4:
        raise KeyError("labels")
    return mean_square(model, batch)


def failing_batches() -> Iterator[Tensor]:
    yield torch.randn(3, 4)
    raise OSError("disk")


def infinite(model: nn.Module, batch: Tensor) -> Tensor:
    return mean_square(model, batch) * (torch.inf if batch.shape[0] == 4 else 1.0)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], Iterator[Tensor]], bool | Callable[..., Tensor], Any]] = {
    "gradient": (mean_square, batches, False, None),
    "empirical": (mean_square, batches, True, None),
    "true": (mean_square, batches, mean_square, None),
    "loss raises": (failing_loss, batches, True, KeyError),
    "sampled loss raises": (mean_square, batches, failing_loss, KeyError),
    "batches raise": (mean_square, failing_batches, True, OSError),
    "not finite": (infinite, batches, True, ValueError),
    "no batches": (mean_square, lambda: iter(()), True, ValueError),
}


@pytest.mark.parametrize("case", CASES)
def test_everything_is_left_as_it_was(case: str) -> None:
    loss, data, curvature, error = CASES[case]
    model = model_of_all_sorts()
    before = snapshot(model)
    if error is None:
        SourceGradient.capture(model, data(), loss, curvature=curvature)
    else:
        with pytest.raises(error):
            SourceGradient.capture(model, data(), loss, curvature=curvature)
    after = snapshot(model)
    assert before["modes"] == [True, True, False, True, True, True, False, True]
    for what, value in before.items():
        assert same(after[what], value), what
    assert torch.is_grad_enabled()


def test_snapshot_sees_a_change() -> None:
    model = model_of_all_sorts()
    before = snapshot(model)
    assert same(snapshot(model), before)
    model.train()
    model(torch.randn(3, 4)).sum().backward()
    after = snapshot(model)
    changed = {what for what in before if not same(after[what], before[what])}
    assert changed == {"modes", "buffers", "grad_identity", "grad_values", "rng"}


def test_dropout_is_off_and_two_captures_agree() -> None:
    model = model_of_all_sorts()
    data = [torch.randn(3, 4) for _ in range(3)]

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        value: Tensor = m(batch).square().mean()
        return value

    first, second = (SourceGradient.capture(model, data, loss, curvature=False) for _ in range(2))
    names = first.names()
    at = [torch.zeros(shape) for shape in first.shapes().values()]
    for a, b in zip(first.row(names, at).tensors, second.row(names, at).tensors, strict=True):
        assert torch.equal(a, b)
    model.eval()
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        torch.cat([model(x).square() for x in data]).mean(), [p for p in model.parameters() if p.requires_grad]
    )
    for a, g in zip(first.row(names, at).tensors, gradients, strict=True):
        torch.testing.assert_close(a, g, rtol=1e-5, atol=1e-6)


def test_source_keeps_no_graph_and_no_live_parameter() -> None:
    model = model_of_all_sorts()
    source = SourceGradient.capture(model, batches(), mean_square)
    names = source.names()
    at = [p.detach() for p in model.parameters() if p.requires_grad]
    before = source.row(names, [p.clone() for p in at])
    assert before.anchor is not None
    kept = [a.clone() for a in before.anchor]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    after = source.row(names, at)
    assert after.anchor is not None
    assert after.offset is not None
    assert all(torch.equal(a, b) for a, b in zip(after.anchor, kept, strict=True))
    assert not any(t.requires_grad for t in (*after.anchor, *after.offset))
