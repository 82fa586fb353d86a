"""Training one problem by one method, and measuring it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.few_shot.measures import Stability, Update, pool_gradient
from benchmarks.few_shot.methods import Method
from benchmarks.few_shot.problem import Problem
from benchmarks.harness import held_bytes
from gradguide.sources.side_effects import Randomness

__all__ = ["Evaluation", "Trained", "train"]

# Where the update is compared with the pool's gradient: early, when most is learnt, and late.
_ALIGNED_AT = (3, 18)
_PROBE_EVERY = 5
_LAST = 5  # steps whose mean loss says whether a run has learnt anything

Spoil = Callable[[int], float]
"""Factor of the loss at a step, by the step's number: a spike of the gradients where it is not 1."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one training gave; nan where it was not measured.

    Args:
        accuracies: by name, in [0, 1], as the problem measures them.
        loss: mean of the last five steps' losses, in nats.
        diverged: that loss is not finite, or not below 0.95 of what guessing gives, log(classes).
        coherence, successive_cosine: of the gradients as received, means over the steps.
        alignment: cosine of the update with the negative pool gradient, mean over two steps.
        steps_to_final: gradients taken until the first probed step at which the probe's accuracy is at least its last.
        seconds_per_step: median time of forward, backward and step, on the CPU of its one thread.
        memory: bytes held for the method beside parameters and gradients: optimizer state, stored rows.
    """

    accuracies: Mapping[str, float]
    loss: float
    diverged: bool
    coherence: float
    successive_cosine: float
    alignment: float
    steps_to_final: float
    seconds_per_step: float
    memory: float


def train(
    problem: Problem,
    method: Method,
    lr: float,
    batches: Iterable[Sequence[int]],
    steps: int,
    *,
    seed: int,
    spoil: Spoil | None = None,
    closely: bool = False,
) -> Trained:
    """Trains ``problem`` for as many steps as take ``steps`` gradients.

    Args:
        batches: row numbers of each step, the same for every method.
        seed: of the model's own randomness (dropout), the same for every method.
        spoil: see ``Spoil``; none by default.
        closely: whether to measure what costs time: alignment, probes and memory.
    """
    device = problem.parameters[0].device
    held = held_bytes() if closely else 0
    learner = method(problem, lr)
    stability = Stability([p for _, p in problem.adapter])
    losses, seconds, alignments, probes = [], [], [], {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step, chosen in enumerate(islice(batches, steps // learner.evaluations)):
            compared = closely and step in _ALIGNED_AT
            goal = pool_gradient(problem) if compared else None
            start = _now(device)
            evaluation = Evaluation(problem, learner.optimizer, chosen, 1.0 if spoil is None else spoil(step))
            loss = evaluation()
            taken = _now(device) - start
            losses.append(float(loss.detach()))
            stability.observe()
            update = Update(problem) if compared else None
            start = _now(device)
            learner.step(evaluation.again)
            seconds.append(taken + _now(device) - start)
            if goal is not None and update is not None:
                alignments.append(update.cosine(goal))
            if closely and ((step + 1) % _PROBE_EVERY == 0 or step + 1 == steps // learner.evaluations):
                probes[step + 1] = problem.probe()
    learner.optimizer.zero_grad()
    memory = held_bytes() - held if closely else math.nan
    last = statistics.fmean(losses[-_LAST:])
    return Trained(
        accuracies=problem.accuracy(),
        loss=last,
        diverged=not last < 0.95 * math.log(problem.classes),
        coherence=statistics.fmean(stability.coherences),
        successive_cosine=statistics.fmean(stability.cosines) if stability.cosines else math.nan,
        alignment=statistics.fmean(alignments) if alignments else math.nan,
        steps_to_final=learner.evaluations * _first_as_good(probes),
        seconds_per_step=statistics.median(seconds),
        memory=memory,
    )


class Evaluation:
    """Loss and gradients of one batch, under the same randomness however often they are asked for."""

    def __init__(self, problem: Problem, optimizer: Optimizer, chosen: Sequence[int], factor: float) -> None:
        self._problem, self._optimizer, self._chosen, self._factor = problem, optimizer, chosen, factor
        self._state = Randomness(problem.parameters)
        self._first: Tensor | None = None

    def __call__(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._problem.loss(self._chosen)
        (loss * self._factor).backward()
        self._first = loss.detach()
        return self._first

    def again(self) -> Tensor:
        """At first what is there already; then anew."""
        if self._first is not None:
            found, self._first = self._first, None
            return found
        self._state.restore()
        return self()


def _first_as_good(probes: Mapping[int, float]) -> float:
    if not probes:
        return math.nan
    final = list(probes.values())[-1]
    return next(step for step, accuracy in probes.items() if accuracy >= final)


def _now(device: torch.device) -> float:
    """Seconds: of this thread on the CPU, so that other work on the machine does not count; else by the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()
