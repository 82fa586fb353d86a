"""Few-shot problems, their episodes drawn from the text sets, and rough data: wrong labels, noise batches, spikes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gradguide import SourceGradient, StructuredSource
from gradguide.demo.data import Example, Task, draw, few_shot, read_file

__all__ = [
    "CONDITIONS",
    "HEAD_LR",
    "SOURCES",
    "Episode",
    "Problem",
    "Rough",
    "episode",
    "outlier_batches",
    "source_task",
    "spikes",
    "wrong_labels",
]

HEAD_LR = 1e-2
"""Learning rate of a new head, for every method. The rate under study is that of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A training problem: parameters, loss and evaluation. Any kind of model can provide one.

    Args:
        adapter: (name, parameter) of what was trained on the source and is trained further on the target.
        head: parameters of the new head.
        head_lr: learning rate of the head; None for that of the adapter.
        rows: number of training rows; row numbers are in [0, rows).
        classes: number of target classes.
        loss: mean loss of the given training rows, a scalar.
        source_loss: one function per earlier task, for methods that use source data at every step. Each call returns
            the mean loss of that task's next batch, a scalar.
        sources: one stored source gradient per earlier task.
        structured: returns the structured source of the source task, and the model that it is for; None if the problem
            has none.
        pool_loss: yields (number of examples, mean loss) for batches of a sample of the whole target training set.
        accuracy: accuracies by name, in [0, 1]; one name is "target".
        probe: accuracy on a small test sample, in [0, 1]; cheap enough to call during training.
    """

    adapter: Sequence[tuple[str, nn.Parameter]]
    head: Sequence[nn.Parameter]
    head_lr: float | None = HEAD_LR
    rows: int
    classes: int
    loss: Callable[[Sequence[int]], Tensor]
    source_loss: Sequence[Callable[[], Tensor]]
    sources: Sequence[SourceGradient]
    pool_loss: Callable[[], Iterable[tuple[int, Tensor]]]
    accuracy: Callable[[], dict[str, float]]
    probe: Callable[[], float]
    structured: Callable[[], tuple[StructuredSource, nn.Module]] | None = None
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", [*(p for _, p in self.adapter), *self.head])

    def groups(self, lr: float) -> list[dict[str, object]]:
        """Return param groups: the adapter at ``lr``, and the head, if there is one, at its own rate."""
        adapter, head = [p for _, p in self.adapter], list(self.head)
        if self.head_lr is None or not head:
            return [{"params": [*adapter, *head], "lr": lr}]
        return [{"params": adapter, "lr": lr}, {"params": head, "lr": self.head_lr}]


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
