"""Draw few-shot episodes from the text sets, and make their data rough: wrong labels, noise batches, loss spikes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.demo import Example, Task, draw, few_shot, read_file

__all__ = [
    "CONDITIONS",
    "SOURCES",
    "Episode",
    "Rough",
    "episode",
    "outlier_batches",
    "source_task",
    "spikes",
    "wrong_labels",
]

SOURCES = {"assistant": "clinc150", "home": "hwu64", "films": "mr"}
"""Source tasks by name, and the set that each is drawn from."""

_ASSISTANT_DOMAINS = 5  # the first of CLINC150's ten, in sorted order; the others are targets
_CLASSES = 15
_TEST_ROWS = 160
_POOL_ROWS = 48
_PROBE_ROWS = 48


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One few-shot task: up to 15 classes of a set, drawn from the seed, and k training rows of each.

    Args:
        task: the classes, their whole training set, and at most 160 test rows.
        train: the few-shot rows.
        pool: at most 48 other rows of the training set.
        probe: at most 48 of the test rows.
    """

    task: Task
    train: list[Example]
    pool: list[Example]
    probe: list[Example]


def source_task(data: Path, name: str) -> Task:
    """Return the source task ``name``, a key of ``SOURCES``."""
    train, test = _read(data / SOURCES[name])
    if name == "assistant":
        domains = _domains(train)[:_ASSISTANT_DOMAINS]
        train, test = (tuple(e for e in rows if e.domain in domains) for rows in (train, test))
    return _task(name, train, test)


def episode(data: Path, name: str, shots: int, seed: int) -> Episode:
    """Return the episode of set ``name`` for ``seed``. CLINC150 gives one of the domains that are not in the source."""
    train, test = _read(data / name)
    if name == SOURCES["assistant"]:
        others = _domains(train)[_ASSISTANT_DOMAINS:]
        domain = others[seed % len(others)]
        train, test = (tuple(e for e in rows if e.domain == domain) for rows in (train, test))
    labels = sorted({e.label for e in train})
    if len(labels) > _CLASSES:
        labels = sorted(random.Random(f"{name}/{seed}").sample(labels, _CLASSES))
    chosen = [tuple(e for e in rows if e.label in labels) for rows in (train, test)]
    task = _task(name, chosen[0], tuple(draw(chosen[1], _TEST_ROWS // len(labels), seed)))
    rows = few_shot(task, shots, seed)
    used = set(rows)
    pool = draw([e for e in task.train if e not in used], max(1, _POOL_ROWS // len(labels)), seed)
    return Episode(task=task, train=rows, pool=pool, probe=draw(task.test, max(1, _PROBE_ROWS // len(labels)), seed))


@lru_cache
def _read(folder: Path) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    return tuple(read_file(folder / "train.tsv")), tuple(read_file(folder / "test.tsv"))


def _domains(rows: Sequence[Example]) -> list[str]:
    return sorted({e.domain for e in rows if e.domain is not None})


def _task(name: str, train: tuple[Example, ...], test: tuple[Example, ...]) -> Task:
    return Task(name=name, labels=tuple(sorted({e.label for e in train})), train=train, test=test)


@dataclass(frozen=True, kw_only=True)
class Rough:
    """
    Args:
        wrong_labels: share of the training rows that get a wrong label, in [0, 1].
        batch: rows per step.
        outliers: probability that the batch of a step is noise (shuffled tokens, random labels), in [0, 1].
        spikes: probability that the loss of a step, and so its gradient, is multiplied by 1000, in [0, 1].
    """

    wrong_labels: float = 0.0
    batch: int = 8
    outliers: float = 0.0
    spikes: float = 0.0


CONDITIONS: dict[str, Rough] = {
    "20% wrong labels": Rough(wrong_labels=0.2),
    "40% wrong labels": Rough(wrong_labels=0.4),
    "batch 1": Rough(batch=1),
    "batch 2": Rough(batch=2),
    "outlier batches": Rough(outliers=0.1),
    "spikes": Rough(spikes=0.1),
}
"""Rough data by the name of its condition in the results."""

_SPIKE = 1000.0  # the size of the error that a bad fp16 loss scale causes


def wrong_labels(rows: Sequence[Example], labels: Sequence[str], share: float, seed: int) -> list[Example]:
    """Return ``rows`` with a share of them, drawn from the seed, given another of ``labels``."""
    generator = random.Random(f"labels/{seed}")
    wrong = set(generator.sample(range(len(rows)), round(share * len(rows))))
    return [
        e._replace(label=generator.choice([label for label in labels if label != e.label])) if i in wrong else e
        for i, e in enumerate(rows)
    ]


def spikes(probability: float, seed: int) -> Callable[[int], float]:
    """Return the factor of the loss as a function of the step: 1000 with the given probability, else 1."""
    return lambda step: _SPIKE if random.Random(f"spike/{seed}/{step}").random() < probability else 1.0


def outlier_batches(
    probability: float, classes: int, seed: int
) -> Callable[[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Return a function of (step, batch) that replaces the batch by noise with the given probability.

    Noise means tokens shuffled over the whole batch, and random labels.
    """

    def corrupt(step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if random.Random(f"outlier/{seed}/{step}").random() >= probability:
            return batch
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        ids, labels = batch["input_ids"], batch["labels"]
        order = torch.randperm(ids.numel(), generator=generator).to(ids.device)
        drawn = torch.randint(classes, labels.shape, generator=generator).to(labels.device)
        return {**batch, "input_ids": ids.reshape(-1)[order].view_as(ids), "labels": drawn}

    return corrupt
