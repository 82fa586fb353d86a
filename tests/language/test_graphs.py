"""Losses captured as CUDA graphs have the gradients of the losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.language.data import Batch, Pair, padded
from benchmarks.language.model import Gradient, Language, answer_loss

pytestmark = pytest.mark.gpu


def problem(folder: Path, device: torch.device) -> tuple[Language, Gradient, Gradient]:
    """Return a model, and its gradient with CUDA graphs and without."""
    model = Language(folder, device)
    model.reset(0)
    return model, Gradient(model), Gradient(model, graphs=False)


def gradients(model: Language, gradient: Gradient, batch: Batch) -> list[Tensor]:
    def loss(*inputs: Tensor) -> Tensor:
        return answer_loss(model, Batch(*inputs), "token")

    gradient("label", loss, batch)
    return [p.grad.clone() for p in model.parameters if p.grad is not None]


def test_a_captured_loss_has_the_gradient_of_the_loss(folder: Path) -> None:
    device = torch.device("cuda")
    model, captured, plain = problem(folder, device)
    batches = [padded([Pair([5, 6, 7, first], [8, 9])] * 4, width=16, answer=4).to(device) for first in (3, 9, 11)]
    optimizer = torch.optim.AdamW(model.parameters, lr=1e-2)
    for batch in batches:
        found = [gradients(model, gradient, batch) for gradient in (plain, captured)]
        assert captured._captured  # it did not fall back
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3)
        optimizer.step()  # replays use the parameters as they are


def test_graphs_of_several_shapes_share_memory_and_keep_their_gradients(folder: Path) -> None:
    device = torch.device("cuda")
    model, captured, plain = problem(folder, device)
    batches = [padded([Pair([5, 6, 7], [8, 9])] * 4, width=width, answer=4).to(device) for width in (16, 48, 32)]
    for batch in batches * 3:
        found = [gradients(model, gradient, batch) for gradient in (plain, captured)]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-3)
    assert len(captured._captured) == 3
