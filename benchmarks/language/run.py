"""Do runs: make the adapter anew, train it, measure, and return the row of results."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.demo import batches
from benchmarks.harness import synchronise
from benchmarks.language.data import Batch, Target, Texts, padded
from benchmarks.language.grid import Run
from benchmarks.language.measures import Drift, Size, accuracy
from benchmarks.language.methods import Term, parse, set_up
from benchmarks.language.model import Gradient, Language, answer_loss
from benchmarks.language.sources import OwnText, Sources, Spec, digest
from gradguide import GradGuide

__all__ = ["Settings", "Suite", "device_of"]

_BATCH = 8


def device_of() -> torch.device:
    """Return the device of the runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of all runs.

    Args:
        model: folder or hub id.
        data: folder of the text sets.
        cache: folder of shared files.
        threads: CPU threads of a process.
        graphs: whether losses are captured as CUDA graphs.
    """

    model: str
    data: Path
    cache: Path
    threads: int
    graphs: bool = True

    def start(self) -> Suite:
        """Return the suite of a worker process."""
        torch.set_num_threads(self.threads)
        return Suite(self)


class Suite:
    """Does runs with one model. Called with a run it returns the measured columns; with a shared file it makes it."""

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoTokenizer

        device = device_of()
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
        self._texts = Texts(settings.data, tokenizer)
        self.model = Language(settings.model, device)
        key = digest(settings.model, settings.data, device)
        self.sources = Sources(self.model, self._texts, tokenizer, settings.cache, key)
        self._gradient = Gradient(self.model, graphs=settings.graphs)
        self._size = Size.of(device)
        self.model.reset(0)
        self._drift = Drift(self.model, self._texts, self._size)
        self._targets: dict[tuple[str, int, int], Target] = {}

    def __call__(self, what: Run | Spec | OwnText) -> dict[str, Any]:
        """Do a run, or make a shared file."""
        if isinstance(what, Run):
            return self.row(what)
        self.sources.make(what)
        return {}

    def row(self, run: Run) -> dict[str, Any]:
        """Do ``run``, and return its measured columns."""
        begun = time.perf_counter()
        target = self._target(run)
        self.model.reset(run.seed)
        seconds, modelled = self._train(run, target)
        return {
            **accuracy(self.model, target, self._size),
            **self._drift(),
            "modelled_drift": modelled,
            "seconds_per_step": seconds / run.steps,
            "seconds": time.perf_counter() - begun,
            "rows": min(self._size.rows, len(target.test)),
        }

    def _target(self, run: Run) -> Target:
        key = run.target, run.shots, run.seed
        if key not in self._targets:
            self._targets[key] = self._texts.target(*key)
        return self._targets[key]

    def _train(self, run: Run, target: Target) -> tuple[float, float | None]:
        """Train the adapter. Return the seconds of the steps, and the drift that the source models."""
        method = parse(run.method)
        training = set_up(method, self.model, self.sources, run.lr)
        unit, term = method.options["unit"], training.term
        key, loss = self._loss(unit, term)
        inputs = self._inputs(run, target, term)
        self._gradient.prepare(key, loss, inputs[0])
        synchronise()
        begun = time.perf_counter()
        for step in inputs:
            self._gradient(key, loss, step)
            training.before()
            training.optimizer.step()
        synchronise()
        seconds = time.perf_counter() - begun
        guide = training.optimizer
        modelled = (
            guide.metrics()["source_drift"] if method.name == "structured" and isinstance(guide, GradGuide) else None
        )
        return seconds, modelled

    def _loss(self, unit: str, term: Term | None) -> tuple[object, Any]:
        def label(*inputs: Tensor) -> Tensor:
            return answer_loss(self.model, Batch(*inputs), unit)

        if term is None:
            return unit, label

        def both(*inputs: Tensor) -> Tensor:
            return label(*inputs[:3]) + term.loss(*inputs[3:])

        return (unit, term.key), both

    def _inputs(self, run: Run, target: Target, term: Term | None) -> list[tuple[Tensor, ...]]:
        """Return the inputs of the loss at each step, on the device."""
        fixed = target.width if self.model.device.type == "cuda" else None
        longest = max(map(len, target.labels))
        order = batches(len(target.train), _BATCH, run.seed)
        found: list[tuple[Tensor, ...]] = []
        texts = batches(len(term.inputs[0]), term.batch, run.seed) if term is not None else None
        for _ in range(run.steps):
            batch = padded([target.pair(row) for row in next(order)], fixed, longest).to(self.model.device)
            extra: tuple[Tensor, ...] = ()
            if term is not None and texts is not None:
                chosen = torch.tensor(next(texts), device=self.model.device)
                extra = tuple(part[chosen] for part in term.inputs)
            found.append((*batch, *extra))
        return found
