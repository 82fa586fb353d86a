"""Run methods on the same problem: the same start, the same rows in the same order, one run per method and seed.

A method is a function ``(model, source)`` that returns a ``torch.optim.Optimizer`` over ``trainable(model)``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from gradguide import Alignment, GradGuide, SourceGradient
from gradguide.demo.config import DemoConfig
from gradguide.demo.data import Transfer, batches
from gradguide.demo.model import Classifier, Encoded, accuracy
from gradguide.demo.source import HEAD as SOURCE_HEAD
from gradguide.integrations.peft import lora_parameters

__all__ = [
    "Coherence",
    "Method",
    "Outcome",
    "Prepared",
    "compare",
    "default_methods",
    "now",
    "trainable",
    "unit_gradient",
]

_HEAD = "target"

Method = Callable[[nn.Module, SourceGradient], Optimizer]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Settings and data of all runs.

    Args:
        config: options of the demo.
        transfer: source and target task.
        model: model with the frozen source head. Runs train its adapter in place.
        adapter: copies of the adapter's parameters after source training, by name. Every run starts from them.
        source: source gradient captured at that point.
        shots: one few-shot training set per seed.
        target_test, source_test: rows on which the accuracies are measured.
        source_accuracy: source accuracy before adaptation, in [0, 1].
    """

    config: DemoConfig
    transfer: Transfer
    model: Classifier
    adapter: dict[str, Tensor]
    source: SourceGradient
    shots: tuple[Encoded, ...]
    target_test: Encoded
    source_test: Encoded
    source_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one run.

    Args:
        target_accuracy, source_accuracy: after the last step, in [0, 1].
        coherence: coherence of the gradients before GradGuide changes them, one value per step, in [0, 1].
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


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a run trains: the adapter and the target head."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def default_methods(lr: float) -> dict[str, Method]:
    """Return AdamW, and the same AdamW inside GradGuide with default options, by name."""

    def plain(model: nn.Module, source: SourceGradient) -> Optimizer:
        return AdamW(trainable(model), lr=lr)

    def guided(model: nn.Module, source: SourceGradient) -> Optimizer:
        alignment = Alignment(source.anchored())
        return GradGuide(plain(model, source), alignment=alignment, names=lora_parameters(model))

    return {"AdamW": plain, "GradGuide": guided}


def compare(prepared: Prepared, methods: Mapping[str, Method]) -> list[Outcome]:
    """Run every method on every seed; return the outcomes by seed, then by method in the given order."""
    config = prepared.config
    total = len(methods) * config.seeds * config.steps
    with tqdm(total=total, desc="adapt", unit="step", disable=None) as bar:
        return [
            _run(prepared, name, method, seed, bar) for seed in range(config.seeds) for name, method in methods.items()
        ]


def _run(prepared: Prepared, name: str, method: Method, seed: int, bar: tqdm[None]) -> Outcome:
    """Adapt to the few-shot set of ``seed``. Rows, their order and the initial head depend on the seed alone."""
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
        torch.manual_seed(seed)  # the same dropout for every method
        for chosen in islice(batches(len(rows), config.batch, seed), config.steps):
            batch = rows.batch(chosen)
            start = now(rows.device)
            optimizer.zero_grad()
            model.loss(_HEAD, batch).backward()
            backward = now(rows.device) - start
            coherence.append(observer.update(parameters))
            start = now(rows.device)
            optimizer.step()
            seconds.append(backward + now(rows.device) - start)
            bar.update()
    return Outcome(
        method=name,
        seed=seed,
        target_accuracy=accuracy(model, _HEAD, prepared.target_test),
        source_accuracy=accuracy(model, SOURCE_HEAD, prepared.source_test),
        coherence=tuple(coherence),
        seconds_per_step=statistics.median(seconds),
    )


def now(device: torch.device) -> float:
    """Return the time in seconds, after all queued work of the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def unit_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the gradients of the parameters as one vector [P] of length 1; zeros stay zeros."""
    gradient = torch.cat([p.grad.reshape(-1).float() for p in parameters if p.grad is not None])
    unit: Tensor = gradient / gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
    return unit


class Coherence:
    """Length of the running mean of unit gradients: 1 if they agree, near 0 if they are noise.

    The demo computes it here, not from GradGuide's metrics, so that all methods are measured alike.
    """

    def __init__(self, decay: float = 0.95) -> None:
        self._decay = decay
        self._steps = 0
        self._mean: Tensor | None = None

    def update(self, parameters: Sequence[nn.Parameter]) -> float:
        """Add the gradients of one step; return the coherence so far, corrected for the zero start of the mean."""
        return self.add(unit_gradient(parameters))

    def add(self, unit: Tensor) -> float:
        """Add one unit gradient [P]; return the coherence so far."""
        self._mean = unit * (1 - self._decay) if self._mean is None else self._mean.lerp(unit, 1 - self._decay)
        self._steps += 1
        return float(self._mean.norm()) / (1 - self._decay**self._steps)
