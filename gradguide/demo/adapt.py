"""One run: from the source-adapted model to the target task, with one method and one seed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradguide.integrations.peft import lora_parameters

from .methods import Method, trainable
from .model import accuracy
from .prepare import Prepared
from .sampling import batches
from .source import HEAD as SOURCE_HEAD

__all__ = ["Coherence", "Outcome", "adapt", "unit_gradient"]

_HEAD = "target"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run gave.

    Args:
        target_accuracy, source_accuracy: after the last step, in [0, 1].
        coherence: of the gradients as received, one value per step, in [0, 1].
        seconds_per_step: median time of forward, backward and optimizer step.
    """

    method: str
    seed: int
    target_accuracy: float
    source_accuracy: float
    coherence: tuple[float, ...]
    seconds_per_step: float

    @property
    def mean_coherence(self) -> float:
        return statistics.fmean(self.coherence)


def unit_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients that the parameters hold, as one vector [P] of length 1; zeros stay zeros."""
    gradient = torch.cat([p.grad.reshape(-1).float() for p in parameters if p.grad is not None])
    unit: Tensor = gradient / gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
    return unit


class Coherence:
    """Length of the running mean of unit gradients: 1 while they agree, near 0 for noise.

    The same code observes every method, whatever the method itself measures.
    """

    def __init__(self, decay: float = 0.95) -> None:
        self._decay = decay
        self._steps = 0
        self._mean: Tensor | None = None

    def update(self, parameters: Sequence[nn.Parameter]) -> float:
        """Takes in the gradients of one step; returns the coherence so far, corrected for the start at zero."""
        return self.add(unit_gradient(parameters))

    def add(self, unit: Tensor) -> float:
        """Takes in one unit gradient [P]; returns the coherence so far."""
        self._mean = unit * (1 - self._decay) if self._mean is None else self._mean.lerp(unit, 1 - self._decay)
        self._steps += 1
        return float(self._mean.norm()) / (1 - self._decay**self._steps)


def adapt(prepared: Prepared, name: str, method: Method, seed: int, bar: tqdm[None] | None = None) -> Outcome:
    """Runs ``method`` on the k-shot set of ``seed``; rows, their order and the first head depend on the seed alone."""
    config, model, rows = prepared.config, prepared.model, prepared.shots[seed]
    with torch.no_grad():
        for parameter_name, parameter in lora_parameters(model):
            parameter.copy_(prepared.adapter[parameter_name])
            parameter.grad = None
    model.add_head(_HEAD, len(prepared.transfer.target.labels), seed)
    parameters = trainable(model)
    optimizer = method(model, prepared.source)
    observer, coherence, seconds = Coherence(), [], []
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout, the same for every method
        for chosen in islice(batches(len(rows), config.batch, seed), config.steps):
            batch = rows.batch(chosen)
            start = _now(rows.device)
            optimizer.zero_grad()
            model.loss(_HEAD, batch).backward()
            backward = _now(rows.device) - start
            coherence.append(observer.update(parameters))
            start = _now(rows.device)
            optimizer.step()
            seconds.append(backward + _now(rows.device) - start)
            if bar is not None:
                bar.update()
    return Outcome(
        method=name,
        seed=seed,
        target_accuracy=accuracy(model, _HEAD, prepared.target_test),
        source_accuracy=accuracy(model, SOURCE_HEAD, prepared.source_test),
        coherence=tuple(coherence),
        seconds_per_step=statistics.median(seconds),
    )


def _now(device: torch.device) -> float:
    """Seconds, when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
