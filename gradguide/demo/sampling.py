"""Drawing rows per class. Draws depend on the seed alone, so that every method sees the same sample."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from .data import Example, Task
from .errors import OptionError

__all__ = ["batches", "draw", "few_shot"]


def draw(examples: Sequence[Example], per_class: int, seed: int) -> list[Example]:
    """At most ``per_class`` rows of each label, in the order of the sorted labels."""
    by_label: dict[str, list[Example]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    # Each label has its own generator: its draw does not change when another label gains a row.
    return [
        example
        for label, rows in sorted(by_label.items())
        for example in random.Random(f"{seed}/{label}").sample(rows, min(per_class, len(rows)))
    ]


def few_shot(task: Task, shots: int, seed: int) -> list[Example]:
    """Exactly ``shots`` training rows of each label of ``task``.

    Raises:
        OptionError: a label has fewer rows.
    """
    for label in task.labels:
        rows = sum(example.label == label for example in task.train)
        if rows < shots:
            raise OptionError("shots", f"must be at most {rows}, the training rows of {label!r}; found {shots}")
    return draw(task.train, shots, seed)


def batches(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers in [0, rows): shuffled passes, one after the other, cut into lists of ``size``.

    A batch is never larger than the rows there are, so that no row occurs twice in the batches of one pass.
    """
    generator = random.Random(seed)
    queue: list[int] = []
    size = min(size, rows)
    while True:
        while len(queue) < size:
            queue.extend(generator.sample(range(rows), rows))
        yield queue[:size]
        del queue[:size]
