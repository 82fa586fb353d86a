"""Capture models with activation checkpointing or torch.compile: gradients equal those of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradguide import SourceGradient
from tests.integrations.lora import QUIET, llama, move

from .problems import answer, close, fisher, mean_square


class Net(nn.Module):
    """Two layers. The first one is checkpointed, optionally inside another checkpoint."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
        self.b = nn.Linear(4, 2).double()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.inner(x))
        return result

    def inner(self, x: Tensor) -> Any:
        match self.kind:
            case "reentrant":
                return checkpoint(self.a, x, use_reentrant=True)
            case "not reentrant":
                return checkpoint(self.a, x, use_reentrant=False)
            case "nested":
                return checkpoint(lambda x: checkpoint(self.a, x, use_reentrant=True), x, use_reentrant=True)
        return self.a(x)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]


@pytest.mark.parametrize("curvature", [True, mean_square, False])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "nested"])
def test_i31_a_checkpointed_model_has_the_gradient_of_the_plain_one(kind: str, curvature: Any) -> None:
    plain = SourceGradient.capture(Net(), data(), mean_square, curvature=curvature, dtype=torch.float64)
    model = Net(kind)
    model.b.weight.grad = held = torch.ones(2, 4, dtype=torch.float64)
    batches = data()
    batches[0].grad = of_batch = torch.ones_like(batches[0])
    source = SourceGradient.capture(model, batches, mean_square, curvature=curvature, dtype=torch.float64)
    at = {name: p.detach() for name, p in model.named_parameters()}
    close(answer(source, at), answer(plain, at))
    assert all(value.any() for value in answer(source, at).values())
    if curvature is not False:
        close(fisher(source, model), fisher(plain, model))
    for name, p in model.named_parameters():
        assert p.grad is (held if name == "b.weight" else None)
    assert [batch.grad for batch in batches] == [of_batch, None, None, None]
    assert torch.equal(held, torch.ones(2, 4))
    assert torch.equal(of_batch, torch.ones(2, 4))


def test_i31_parameters_cut_off_by_a_reentrant_checkpoint_are_named() -> None:
    """The inputs require no gradient, so the parameters get no gradient in training either."""
    batches = [batch.detach() for batch in data()]
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.warns(UserWarning, match=r"2 of the 4 .*\(a\.0\.weight, a\.0\.bias\).*enable_input_require_grads"),
    ):
        SourceGradient.capture(Net("reentrant"), batches, mean_square)


def test_i31_some_of_the_parameters_of_a_checkpoint() -> None:
    model = Net("reentrant")
    whole = SourceGradient.capture(model, data(), mean_square, dtype=torch.float64)
    names = [("a.0.bias", model.get_parameter("a.0.bias"))]
    part = SourceGradient.capture(model, data(), mean_square, dtype=torch.float64, names=names)
    at = {name: p.detach() for name, p in model.named_parameters()}
    close(answer(part, at), {"a.0.bias": answer(whole, at)["a.0.bias"]})


def causal(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    value: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return value


@QUIET
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_i31_gradient_checkpointing_of_transformers(reentrant: bool, mode: str) -> None:
    model = llama()
    move(model)
    batches = [{"input_ids": torch.randint(40, (2, 6))} for _ in range(3)]
    plain = SourceGradient.capture(model, batches, causal)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    # There is no dropout in this model.
    source = SourceGradient.capture(model, batches, causal, mode=mode)
    at = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    close(answer(source, at), answer(plain, at), rtol=1e-4, atol=1e-7)
    assert all(value.any() for value in answer(source, at).values())


@pytest.mark.parametrize("wrap", [copy.deepcopy, lambda m: torch.compile(m, backend="eager")])
def test_a_compiled_model_has_the_gradient_of_the_plain_one(wrap: Callable[[nn.Module], nn.Module]) -> None:
    batches = [batch.detach() for batch in data()]
    plain = SourceGradient.capture(Net(), batches, mean_square, dtype=torch.float64)
    source = SourceGradient.capture(wrap(Net()), batches, mean_square, dtype=torch.float64)
    at = {name: p.detach() for name, p in Net().named_parameters()}
    close(answer(source, at), answer(plain, at))
