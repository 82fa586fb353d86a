"""Do runs: make the adapter anew, train it, measure, and return the row of results."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import synchronise
from benchmarks.language import scenarios
from benchmarks.language.data import Batch, Rows, Target, Texts, padded
from benchmarks.language.grid import Run
from benchmarks.language.measures import Drift, Size, bytes_of
from benchmarks.language.memories import Batches, rows_of
from benchmarks.language.methods import METHODS, Method, parse, set_up
from benchmarks.language.model import Gradient, Language, answer_loss
from benchmarks.language.sources import File, Sources, digest
from benchmarks.language.stability import Stability
from benchmarks.language.training import Setup, Term, scheduler
from gradguide import GradGuide
from gradguide.demo.data import batches

__all__ = ["Settings", "Suite", "Trained", "device_of"]

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
        stability: whether runs of one task measure the stability of gradients, which takes time.
        share: the part of the GPU's memory that a process may take. A run that needs more fails alone.
    """

    model: str
    data: Path
    cache: Path
    threads: int
    graphs: bool = True
    stability: bool = False
    share: float = 1.0

    def start(self) -> Suite:
        """Return the suite of a worker process."""
        torch.set_num_threads(self.threads)
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(self.share)
        return Suite(self)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Measurements of the training of a task.

    Args:
        seconds: of all steps.
        steps: their number.
        modelled: drift that a structured source models, in nats per token.
        held: bytes that the method keeps of source data.
        stability: see ``stability.Stability.columns``.
    """

    seconds: float
    steps: int
    modelled: float | None
    held: int
    stability: Mapping[str, float | None]


class Suite:
    """Does runs with one model. Called with a run it returns the measured columns; with a shared file it makes it."""

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoTokenizer

        device = device_of()
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
        self.texts = Texts(settings.data, tokenizer)
        self.model = Language(settings.model, device)
        key = digest(settings.model, settings.data, device)
        self.sources = Sources(self.model, self.texts, tokenizer, settings.cache, key)
        self._stable = settings.stability
        self._gradient = Gradient(self.model, graphs=settings.graphs)
        self.size = Size.of(device)
        self.model.reset(0)
        self.drift = Drift(self.model, self.texts, self.size)
        self._targets: dict[tuple[str, int, int], Target] = {}
        self._of_text: dict[tuple[str, int], Any] = {}
        self.learnt: dict[str, tuple[list[Tensor], float]] = {}
        """Source tasks that were learnt: the adapter and its accuracy."""

    def __call__(self, what: Run | File) -> dict[str, Any]:
        """Do a run, or make a shared file."""
        try:
            if isinstance(what, Run):
                return self.row(what)
            self.sources.make(what)
            return {}
        except torch.OutOfMemoryError:
            self._of_text.clear()
            torch.cuda.empty_cache()
            raise

    def row(self, run: Run) -> dict[str, Any]:
        """Do ``run``, and return its measured columns."""
        begun = time.perf_counter()
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self.model.reset(run.seed)
        measured = scenarios.SCENARIOS[run.scenario](self, run)
        return {
            **measured,
            "memory": torch.cuda.max_memory_allocated() if cuda else None,
            "seconds": time.perf_counter() - begun,
        }

    def target(self, name: str, shots: int, seed: int) -> Target:
        """Return a task, see ``data.Texts.target``."""
        key = name, shots, seed
        if key not in self._targets:
            self._targets[key] = self.texts.target(*key)
        return self._targets[key]

    def remember(self, method: Method, batches: Batches, kept: Sequence[Any], seed: int) -> list[Any]:
        """Return what the method keeps after a task is finished; labels are drawn by ``seed``."""
        remember = METHODS[method.name].remember
        if remember is None:
            return list(kept)
        torch.manual_seed(seed)
        return remember(self.model, batches, method, kept)

    def remember_rows(self, method: Method, rows: Rows, kept: Sequence[Any], seed: int) -> list[Any]:
        """Return the same for training rows."""
        return self.remember(method, rows_of(rows, self.model.device), kept, seed)

    def remember_text(self, method: Method, seed: int) -> list[Any]:
        """Return what the method remembers of the base model's source text. The adapter must be that of ``seed``."""
        if not METHODS[method.name].of_text:
            return []
        self._of_text = {key: value for key, value in self._of_text.items() if key[1] == seed}
        if (method.name, seed) not in self._of_text:
            self._of_text[method.name, seed] = self.remember(method, self.sources.text(), (), seed)
        found: list[Any] = self._of_text[method.name, seed]
        return found

    def train(
        self,
        run: Run,
        rows: Rows,
        kept: Sequence[Any] = (),
        *,
        steps: int | None = None,
        pool: Rows | None = None,
    ) -> Trained:
        """Train the adapter on ``rows``, with what the run's method has kept.

        Args:
            steps: number of steps, if it is not that of the run.
            pool: rows that stand for all rows of the task; with them, stability is measured if the settings say so.
        """
        method = parse(run.method)
        steps = run.steps if steps is None else steps
        setup = Setup(model=self.model, sources=self.sources, lr=run.lr, method=method, kept=kept)
        training = set_up(method, setup)
        schedule = scheduler(training, method, steps)
        term = training.term
        inputs = self._inputs(rows, steps, run.seed, term)
        label, both = self._losses(method.options["unit"], term)
        chosen = [both if term is not None and step % term.every == 0 else label for step in range(steps)]
        for index in {id(part): index for index, part in enumerate(chosen)}.values():
            self._gradient.prepare(*chosen[index], inputs[index][: 3 if chosen[index] is label else None])
        stability = self._stability(label, pool, steps) if self._stable and pool is not None else None
        synchronise()
        begun = time.perf_counter()
        for step, (loss, given) in enumerate(zip(chosen, inputs, strict=True), 1):
            if stability is not None:
                stability.before(step)
            self._gradient(*loss, given[: 3 if loss is label else None])
            if stability is not None:
                stability.observe()
            training.before()
            training.optimizer.step()
            if stability is not None:
                stability.after()
            if training.after is not None:
                training.after(step)
            if schedule is not None:
                schedule.step()
        training.end()
        synchronise()
        seconds = time.perf_counter() - begun
        guide = training.optimizer
        modelled = guide.metrics()["source_drift"] if steps and isinstance(guide, GradGuide) else math.nan
        return Trained(
            seconds=seconds,
            steps=steps,
            modelled=None if math.isnan(modelled) else modelled,
            held=bytes_of(training.held),
            stability={} if stability is None else stability.columns(),
        )

    def _stability(self, label: tuple[object, Any], pool: Rows, steps: int) -> Stability:
        batches = [part[:3] for part in self._inputs(pool, len(pool.pairs) // _BATCH, 0, None)]
        parts = [partial(self._gradient, *label, part) for part in batches]
        return Stability(self.model.parameters, parts, (steps // 4 + 1, 3 * steps // 4 + 1))

    def _losses(self, unit: str, term: Term | None) -> tuple[tuple[object, Any], tuple[object, Any]]:
        """Return key and loss of the labels alone, and those of labels and term."""

        def label(*inputs: Tensor) -> Tensor:
            return answer_loss(self.model, Batch(*inputs), unit)

        key = unit, self.model.variant
        if term is None:
            return (key, label), (key, label)

        def both(*inputs: Tensor) -> Tensor:
            return label(*inputs[:3]) + inputs[3] * term.loss(*inputs[4:])

        return (key, label), ((*key, term.key), both)

    def _inputs(self, rows: Rows, steps: int, seed: int, term: Term | None) -> list[tuple[Tensor, ...]]:
        """Return the inputs of the loss at each step, on the device: the batch, the term's weight and its text."""
        device = self.model.device
        width = rows.width if device.type == "cuda" else None
        order = batches(len(rows.pairs), _BATCH, seed)
        found: list[tuple[Tensor, ...]] = []
        texts = batches(len(term.inputs[0]), term.batch, seed) if term is not None else None
        weight = torch.tensor(term.weight, device=device) if term is not None else None
        for _ in range(steps):
            batch = padded([rows.pairs[row] for row in next(order)], width, rows.answer).to(device)
            extra: tuple[Tensor, ...] = ()
            if term is not None and texts is not None and weight is not None:
                chosen = torch.tensor(next(texts), device=device)
                extra = (weight, *(part[chosen] for part in term.inputs))
            found.append((*batch, *extra))
        return found
