"""What a run does: it makes the problem (or, in a sequence, five), trains, and returns the row of results."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.few_shot.candidates import CANDIDATES
from benchmarks.few_shot.causal import Causal
from benchmarks.few_shot.digits import Digits
from benchmarks.few_shot.grid import ONE_RATE, SEQUENCES, Run
from benchmarks.few_shot.language import Encoder, Known, LiveRows
from benchmarks.few_shot.memory import peak_memory, reset_peak
from benchmarks.few_shot.methods import METHODS, STORED
from benchmarks.few_shot.problem import HEAD_LR, Problem
from benchmarks.few_shot.rough import CONDITIONS, Rough, outlier_batches, spikes
from benchmarks.few_shot.texts import episode, spoil_labels
from benchmarks.few_shot.train import Trained, train
from gradguide.demo.data import batches
from gradguide.demo.model import Encoded, accuracy
from gradguide.demo.source import capture_source

__all__ = ["Settings", "Suite"]

STEPS = 30
_DIGITS_STEPS = 60
_BATCH = 8
_ALL = {**METHODS, **CANDIDATES}
_CLOSELY = 2  # seeds below this are also measured where it costs time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a suite's models and data are: ``model`` and ``causal`` take hub ids or folders."""

    data: Path
    cache: Path
    model: str
    causal: str | None = None


@dataclass
class Suite:
    """Makes runs, keeping the models that they share."""

    settings: Settings
    _encoders: dict[str, Encoder] = field(default_factory=dict)
    _digits: Digits | None = None
    _causal: Causal | None = None

    def prepare(self, run: Run) -> None:
        """What the run shares with others: trains the source task where that has not been done."""
        if run.scenario == "digits":
            self._digits = self._digits or Digits()
        elif run.scenario == "causal":
            self._causal = self._causal or Causal(str(self.settings.causal), self.settings.data)
        elif run.source not in self._encoders:
            name = None if run.source == "none" else run.source
            self._encoders[run.source] = Encoder(self.settings.model, self.settings.data, name, self.settings.cache)

    def row(self, run: Run) -> dict[str, Any]:
        """The results of ``run``."""
        self.prepare(run)
        reset_peak()
        start = time.perf_counter()
        made = {"digits": self._digit_run, "causal": self._causal_run, "sequence": self._sequence_run}
        row = made.get(run.scenario, self._transfer_run)(run)
        return {**row, "peak_memory": peak_memory(), "seconds": time.perf_counter() - start}

    def _transfer_run(self, run: Run) -> dict[str, Any]:
        encoder = self._encoders[run.source]
        encoder.reset()
        rough = CONDITIONS.get(run.condition, Rough())
        few = episode(self.settings.data, run.target, run.shots, run.seed)
        problem = encoder.problem(
            few,
            run.seed,
            head_lr=None if run.condition == ONE_RATE else HEAD_LR,
            rows=spoil_labels(few.train, few.task.labels, rough.wrong_labels, run.seed),
            spoilt=outlier_batches(rough.outliers, len(few.task.labels), run.seed) if rough.outliers else None,
        )
        trained = train(
            problem,
            _ALL[run.method],
            run.lr,
            batches(problem.rows, rough.batch, run.seed),
            STEPS * _BATCH // rough.batch if rough.batch < _BATCH else STEPS,
            seed=run.seed,
            spoil=spikes(rough.spikes, run.seed) if rough.spikes else None,
            closely=run.seed < _CLOSELY,
        )
        return _row(trained, encoder.source_accuracy)

    def _digit_run(self, run: Run) -> dict[str, Any]:
        assert self._digits is not None
        return _clean_run(run, self._digits.problem(run.shots, run.seed), _DIGITS_STEPS, self._digits.source_accuracy)

    def _causal_run(self, run: Run) -> dict[str, Any]:
        assert self._causal is not None
        few = episode(self.settings.data, run.target, run.shots, run.seed)
        return _clean_run(run, self._causal.problem(few, run.seed), STEPS, self._causal.source_accuracy)

    def _sequence_run(self, run: Run) -> dict[str, Any]:
        """Five tasks one after the other. Each one's stored source and rows are kept for those that follow.

        ``target_accuracy`` is the mean over the five at the end, ``source_accuracy`` that over the first four, and
        ``backward_transfer`` the mean change of those four since each was learnt.
        """
        encoder = self._encoders[run.source]
        encoder.reset()
        known = Known(sources=(), live=(), judged=dict)
        tests: dict[str, Encoded] = {}
        learnt, each, captured = [], [], 0.0
        for place, name in enumerate(SEQUENCES[run.target]):
            head = f"task{place}"
            few = episode(self.settings.data, name, run.shots, 101 * place + run.seed)
            rows = encoder.encode(few.train, few.task.labels)
            tests[head] = encoder.encode(few.task.test, few.task.labels)
            problem = encoder.problem(few, run.seed, known=known, head=head)
            stream = batches(problem.rows, _BATCH, run.seed)
            each.append(train(problem, _ALL[run.method], run.lr, stream, STEPS, seed=run.seed))
            learnt.append(each[-1].accuracies["target"])
            encoder.model.heads[head].requires_grad_(False)
            start = time.thread_time()
            stored = run.method in STORED or run.method in CANDIDATES
            captures = [capture_source(encoder.model, rows, seed=run.seed, head=head)] if stored else []
            captured += time.thread_time() - start
            known = Known(
                sources=(*known.sources, *captures),
                live=(*known.live, LiveRows(head=head, rows=rows)),
                judged=dict,
            )
        final = [accuracy(encoder.model, head, test) for head, test in tests.items()]
        changes = [after - before for after, before in zip(final[:-1], learnt[:-1], strict=True)]
        return {
            "target_accuracy": statistics.fmean(final),
            "source_accuracy": statistics.fmean(final[:-1]),
            "source_accuracy_before": math.nan,
            "backward_transfer": statistics.fmean(changes),
            "loss": each[-1].loss,
            "diverged": int(any(t.diverged for t in each)),
            "coherence": statistics.fmean(t.coherence for t in each),
            "successive_cosine": statistics.fmean(t.successive_cosine for t in each),
            "alignment": math.nan,
            "steps_to_final": math.nan,
            "seconds_per_step": statistics.fmean(t.seconds_per_step for t in each),
            "capture_seconds": captured,
            "memory": math.nan,
        }


def _clean_run(run: Run, problem: Problem, steps: int, source_before: float) -> dict[str, Any]:
    stream = batches(problem.rows, _BATCH, run.seed)
    trained = train(problem, _ALL[run.method], run.lr, stream, steps, seed=run.seed, closely=run.seed < _CLOSELY)
    return _row(trained, source_before)


def _row(trained: Trained, source_before: float) -> dict[str, Any]:
    return {
        "target_accuracy": trained.accuracies["target"],
        "source_accuracy": trained.accuracies["source"],
        "source_accuracy_before": source_before,
        "backward_transfer": math.nan,
        "loss": trained.loss,
        "diverged": int(trained.diverged),
        "coherence": trained.coherence,
        "successive_cosine": trained.successive_cosine,
        "alignment": trained.alignment,
        "steps_to_final": trained.steps_to_final,
        "seconds_per_step": trained.seconds_per_step,
        "capture_seconds": math.nan,
        "memory": trained.memory,
    }
