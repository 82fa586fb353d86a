"""Methods that see source data at every step, at their true cost: a backward pass per earlier task and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.few_shot.problem import Problem

__all__ = ["a_gem", "pcgrad", "replay", "upgrad"]


def a_gem(problem: Problem) -> Callable[[], None]:
    """Projects the gradient where it conflicts with that of a batch of all earlier tasks: arXiv 1812.00420, eq. 11."""

    def combine(g: Tensor, sources: Tensor) -> Tensor:
        reference = sources.mean(dim=0)
        inner = torch.dot(g, reference)
        return g - (inner / torch.dot(reference, reference)) * reference if inner < 0 else g

    return _changed(problem, combine)


def replay(problem: Problem) -> Callable[[], None]:
    """Adds the gradients of the earlier tasks' batches: training on the mixture, each task with equal weight."""
    return _changed(problem, lambda g, sources: g + sources.sum(dim=0))


def pcgrad(problem: Problem) -> Callable[[], None]:
    """The gradients of target and earlier tasks by TorchJD's PCGrad (arXiv 2001.06782)."""
    from torchjd.aggregation import PCGrad

    return _aggregated(problem, PCGrad())


def upgrad(problem: Problem) -> Callable[[], None]:
    """The gradients of target and earlier tasks by TorchJD's UPGrad (arXiv 2406.16232), as a sum like the others."""
    from torchjd.aggregation import UPGrad

    aggregator = UPGrad()
    return _aggregated(problem, lambda matrix: aggregator(matrix) * matrix.shape[0])


def _aggregated(problem: Problem, aggregate: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def combine(g: Tensor, sources: Tensor) -> Tensor:
        return aggregate(torch.cat([g.unsqueeze(0), sources]))

    return _changed(problem, combine)


def _changed(problem: Problem, combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """Replaces the adapter's gradient g [P] by ``combine(g, sources [K, P])``; the head knows the target alone."""
    parameters = [p for _, p in problem.adapter]

    def change() -> None:
        if not problem.source_loss:  # the first task of a sequence
            return
        sources = torch.stack([_flat(torch.autograd.grad(loss(), parameters)) for loss in problem.source_loss])
        received = _flat([p.grad for p in parameters if p.grad is not None])
        sizes = [p.numel() for p in parameters]
        for parameter, part in zip(parameters, combine(received, sources).split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    return change


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
