"""What is observed of a run, by the same code for every method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.few_shot.problem import Problem
from gradguide.demo.compare import Coherence, unit_gradient

__all__ = ["Stability", "Update", "pool_gradient"]


class Stability:
    """Stability of the gradients as received.

    coherence: length of the running mean of unit gradients (decay 0.95), corrected for its start; mean over steps.
    successive_cosine: cosine of a gradient with the one before it; mean over steps.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._coherence = Coherence()
        self._last: Tensor | None = None
        self.coherences: list[float] = []
        self.cosines: list[float] = []

    def observe(self) -> None:
        """Takes in the gradients that the parameters hold."""
        unit = unit_gradient(self._parameters)
        if self._last is not None:
            self.cosines.append(float(torch.dot(unit, self._last)))
        self._last = unit
        self.coherences.append(self._coherence.add(unit))


class Update:
    """The update that one step makes to the adapter, from its values before and after."""

    def __init__(self, problem: Problem) -> None:
        self._parameters = [p for _, p in problem.adapter]
        self._before = [p.detach().clone() for p in self._parameters]

    def cosine(self, gradient: Tensor) -> float:
        """Cosine of the update with the *negative* of ``gradient`` [P]; 0 where nothing moved."""
        change = torch.cat(
            [(p.detach() - old).reshape(-1) for p, old in zip(self._parameters, self._before, strict=True)]
        )
        return float(nn.functional.cosine_similarity(-gradient, change, dim=0))


def pool_gradient(problem: Problem) -> Tensor:
    """Mean gradient of the adapter over the pool's sample, [P]: where the target's whole training set would go."""
    parameters = [p for _, p in problem.adapter]
    total, examples = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device), 0
    for count, loss in problem.pool_loss():
        gradients = torch.autograd.grad(loss, parameters)
        total += count * torch.cat([g.reshape(-1).float() for g in gradients])
        examples += count
    return total / examples
