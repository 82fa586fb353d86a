"""The text sets, and the few-shot episodes drawn from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gradguide.demo.data import Example, Task, draw, few_shot, read_file

__all__ = ["SOURCES", "Episode", "episode", "source_task", "spoil_labels"]

SOURCES = {"assistant": "clinc150", "home": "hwu64", "films": "mr"}
"""Source tasks by name, and the set that each is made of."""

_ASSISTANT_DOMAINS = 5  # of CLINC150's ten, in sorted order; the others are left for targets
_CLASSES = 15
_TEST_ROWS = 160
_POOL_ROWS = 48
_PROBE_ROWS = 48


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One few-shot task: up to 15 classes of a set, drawn from the seed, and k training rows of each.

    Args:
        task: the classes, their whole training pool, and at most 160 test rows.
        train: the few-shot rows.
        pool: at most 48 other rows of the training pool.
        probe: at most 48 test rows.
    """

    task: Task
    train: list[Example]
    pool: list[Example]
    probe: list[Example]


@lru_cache
def _read(folder: Path) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    return tuple(read_file(folder / "train.tsv")), tuple(read_file(folder / "test.tsv"))


def source_task(data: Path, name: str) -> Task:
    """The source task called ``name``: see ``SOURCES``."""
    train, test = _read(data / SOURCES[name])
    if name == "assistant":
        known = _domains(train)[:_ASSISTANT_DOMAINS]
        train, test = (tuple(e for e in rows if e.domain in known) for rows in (train, test))
    return _task(name, train, test)


def episode(data: Path, name: str, shots: int, seed: int) -> Episode:
    """The episode of set ``name`` and ``seed``; of CLINC150, one of the domains that are no source."""
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


def spoil_labels(rows: Sequence[Example], labels: Sequence[str], share: float, seed: int) -> list[Example]:
    """``rows`` with the labels of a share of them, drawn from the seed, replaced by another of ``labels``."""
    generator = random.Random(f"labels/{seed}")
    wrong = set(generator.sample(range(len(rows)), round(share * len(rows))))
    return [
        e._replace(label=generator.choice([label for label in labels if label != e.label])) if i in wrong else e
        for i, e in enumerate(rows)
    ]


def _domains(rows: Sequence[Example]) -> list[str]:
    return sorted({e.domain for e in rows if e.domain is not None})


def _task(name: str, train: tuple[Example, ...], test: tuple[Example, ...]) -> Task:
    return Task(name=name, labels=tuple(sorted({e.label for e in train})), train=train, test=test)
