"""Train one problem by one method, and measure the run by the same code for every method."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.few_shot.data import Problem
from benchmarks.few_shot.methods import Method
from benchmarks.harness import held_bytes
from gradguide.demo.compare import Coherence, unit_gradient
from gradguide.sources.side_effects import RandomState

__all__ = ["Evaluation", "Trained", "peak_memory", "reset_peak", "train"]

# Steps whose update is compared with the pool's gradient: an early one, when most is learned, and a late one.
_ALIGNED_AT = (3, 18)
_PROBE_EVERY = 5
_LAST = 5  # steps whose mean loss decides whether a run diverged

LossFactor = Callable[[int], float]
"""Factor of the loss by step number. A factor other than 1 makes a spike of the gradient."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Results of one training; nan if not measured.

    Args:
        accuracies: by name, in [0, 1], as ``Problem.accuracy`` returns them.
        loss: mean loss of the last five steps, in nats.
        diverged: whether that loss is not finite, or not below 0.95 log(classes), the loss of guessing.
        coherence, successive_cosine: of the gradients before any change; means over the steps. See ``Stability``.
        alignment: cosine of the update with the negative pool gradient; mean over two steps.
        steps_to_final: gradients used until the probe's accuracy first reaches its last value.
        seconds_per_step: median time of forward, backward and step; on the CPU, time of its one thread.
        memory: bytes that the method holds beside parameters and gradients: optimizer state, stored rows.
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
    loss_factor: LossFactor = lambda _: 1.0,
    detailed: bool = False,
) -> Trained:
    """Train ``problem`` for as many steps as use ``steps`` gradients.

    Args:
        problem: what to train; its parameters change.
        method: a value of ``METHODS``.
        lr: learning rate of the adapter.
        batches: row numbers of each step, the same for every method.
        steps: number of gradients.
        seed: of the model's randomness (dropout), the same for every method.
        loss_factor: see ``LossFactor``.
        detailed: whether to measure what takes extra time: alignment, probes and memory.
    """
    device = problem.parameters[0].device
    held = held_bytes() if detailed else 0
    learner = method(problem, lr)
    stability = Stability([p for _, p in problem.adapter])
    losses, seconds, alignments, probes = [], [], [], {}
    count = steps // learner.evaluations
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step, chosen in enumerate(islice(batches, count)):
            aligned = detailed and step in _ALIGNED_AT
            pool = pool_gradient(problem) if aligned else None
            start = _now(device)
            evaluation = Evaluation(problem, learner.optimizer, chosen, loss_factor(step))
            loss = evaluation()
            elapsed = _now(device) - start
            losses.append(float(loss.detach()))
            stability.observe()
            update = Update(problem) if aligned else None
            start = _now(device)
            learner.step(evaluation.closure)
            seconds.append(elapsed + _now(device) - start)
            if pool is not None and update is not None:
                alignments.append(update.cosine(pool))
            if detailed and ((step + 1) % _PROBE_EVERY == 0 or step + 1 == count):
                probes[step + 1] = problem.probe()
    learner.optimizer.zero_grad()
    memory = held_bytes() - held if detailed else math.nan
    last = statistics.fmean(losses[-_LAST:])
    return Trained(
        accuracies=problem.accuracy(),
        loss=last,
        diverged=not last < 0.95 * math.log(problem.classes),
        coherence=statistics.fmean(stability.coherences),
        successive_cosine=statistics.fmean(stability.cosines) if stability.cosines else math.nan,
        alignment=statistics.fmean(alignments) if alignments else math.nan,
        steps_to_final=learner.evaluations * _first_at_final(probes),
        seconds_per_step=statistics.median(seconds),
        memory=memory,
    )


class Evaluation:
    """Loss and gradients of one batch, with the same random numbers at every call."""

    def __init__(self, problem: Problem, optimizer: Optimizer, chosen: Sequence[int], factor: float) -> None:
        self._problem, self._optimizer, self._chosen, self._factor = problem, optimizer, chosen, factor
        self._state = RandomState(problem.parameters)
        self._first: Tensor | None = None

    def __call__(self) -> Tensor:
        """Evaluate, and return the loss."""
        self._optimizer.zero_grad()
        loss = self._problem.loss(self._chosen)
        (loss * self._factor).backward()
        self._first = loss.detach()
        return self._first

    def closure(self) -> Tensor:
        """Return the existing loss at the first call, so that its gradients are used; evaluate again at later calls."""
        if self._first is not None:
            found, self._first = self._first, None
            return found
        self._state.restore()
        return self()


class Stability:
    """Stability of the gradients, before any change.

    coherences: per step, the length of the running mean of unit gradients (decay 0.95), corrected for its start.
    cosines: per step but the first, the cosine of the gradient with the one before it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._coherence = Coherence()
        self._last: Tensor | None = None
        self.coherences: list[float] = []
        self.cosines: list[float] = []

    def observe(self) -> None:
        """Add the gradients that the parameters hold."""
        unit = unit_gradient(self._parameters)
        if self._last is not None:
            self.cosines.append(float(torch.dot(unit, self._last)))
        self._last = unit
        self.coherences.append(self._coherence.add(unit))


class Update:
    """The change that one step makes to the adapter; created before the step."""

    def __init__(self, problem: Problem) -> None:
        self._parameters = [p for _, p in problem.adapter]
        self._before = [p.detach().clone() for p in self._parameters]

    def cosine(self, gradient: Tensor) -> float:
        """Return the cosine of the update with the *negative* of ``gradient`` [P]; 0 for an update of zero."""
        change = torch.cat(
            [(p.detach() - old).reshape(-1) for p, old in zip(self._parameters, self._before, strict=True)]
        )
        return float(nn.functional.cosine_similarity(-gradient, change, dim=0))


def pool_gradient(problem: Problem) -> Tensor:
    """Return the mean gradient of the adapter over the pool's sample, [P]: an estimate for the whole training set."""
    parameters = [p for _, p in problem.adapter]
    total, examples = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device), 0
    for count, loss in problem.pool_loss():
        gradients = torch.autograd.grad(loss, parameters)
        total += count * torch.cat([g.reshape(-1).float() for g in gradients])
        examples += count
    return total / examples


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Set the peak of memory to what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _RESET.exists():
        _RESET.write_text("5")  # man 5 proc: resets the peak of the resident set


def peak_memory() -> float:
    """Return the peak of memory in bytes: of tensors on CUDA, else of the process (Linux only; nan elsewhere)."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    if not _STATUS.exists():
        return math.nan
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return 1024.0 * int(line.split()[1])


def _first_at_final(probes: Mapping[int, float]) -> float:
    if not probes:
        return math.nan
    final = list(probes.values())[-1]
    return next(step for step, accuracy in probes.items() if accuracy >= final)


def _now(device: torch.device) -> float:
    """Return seconds: of this thread on the CPU, so that other processes do not count; of the clock on CUDA."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()
