"""Labelled texts: reading files, splitting them into a source and a target task, and sampling rows."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gradguide.demo.config import DemoError, OptionError

__all__ = ["Example", "Task", "Transfer", "batches", "draw", "few_shot", "read_file", "read_transfer"]

_MAX_DEFAULT_SOURCES = 5  # more source domains make source training too slow for a demo


class Example(NamedTuple):
    """One row of a file."""

    text: str
    label: str
    domain: str | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task.

    Args:
        name: its domain or domains, for display.
        labels: sorted names of its classes; class i is ``labels[i]``.
        train, test: its rows, in file order.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The source task, the target task, and a phrase that says how the rows were split."""

    source: Task
    target: Task
    split: str


def read_transfer(folder: Path, *, target: str | None = None, sources: Sequence[str] = ()) -> Transfer:
    """Return the tasks in ``folder/train.tsv`` and ``folder/test.tsv``.

    Raises:
        DemoError: see ``read_file`` and ``_split_tasks``; or ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise OptionError("data", f"must be a folder with train.tsv and test.tsv, found {str(folder)!r}")
    return _split_tasks(read_file(folder / "train.tsv"), read_file(folder / "test.tsv"), target=target, sources=sources)


def read_file(path: Path) -> list[Example]:
    """Return the rows of a tab-separated UTF-8 file with the columns text, label and, optionally, domain.

    The first line is the header. Quotation marks are plain characters. Other columns and blank lines are ignored.

    Raises:
        DemoError: the file is missing, empty or not UTF-8, lacks a column, or has a row with an empty or missing field.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except FileNotFoundError:
        raise DemoError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DemoError(f"{path}: cannot be read: {error}") from error
    if len(rows) < 2:
        raise DemoError(f"{path}: expected a header line and at least one row, found {len(rows)} lines")
    header = rows[0]
    for column in ("text", "label"):
        if column not in header:
            raise DemoError(f"{path}: no column {column!r}, found {', '.join(header)}")
    columns = [header.index(column) for column in ("text", "label", "domain") if column in header]
    examples = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        fields = [row[index] if index < len(row) else "" for index in columns]
        if not all(fields):
            raise DemoError(f"{path}, line {number}: expected {', '.join(header[i] for i in columns)}, found {row}")
        examples.append(Example(fields[0], fields[1], fields[2] if len(fields) == 3 else None))
    return examples


def _split_tasks(
    train: Sequence[Example], test: Sequence[Example], *, target: str | None = None, sources: Sequence[str] = ()
) -> Transfer:
    """Split rows into a source and a target task, by domain if the rows have one, else by halves of the sorted labels.

    Args:
        target: target domain. Default: the last one, sorted by name.
        sources: source domains. Default: the first five others, sorted by name.

    Raises:
        DemoError: a domain is unknown, or a task has fewer than two classes or no test rows.
    """
    domains = sorted({example.domain for example in train if example.domain is not None})
    if not domains:
        return _split_by_label(train, test, target=target, sources=sources)
    for option, names in (("target", [target] if target is not None else []), ("source", sources)):
        for name in names:
            if name not in domains:
                raise OptionError(option, f"must be one of {', '.join(domains)}; found {name!r}")
    if len(domains) < 2:
        raise DemoError(f"the data must have at least two domains, for source and target, found only {domains[0]!r}")
    target = domains[-1] if target is None else target
    if target in sources:
        raise OptionError("source", f"must not contain the target domain, found {target!r}")
    chosen = sorted(set(sources)) or [name for name in domains if name != target][:_MAX_DEFAULT_SOURCES]
    return Transfer(
        source=_task(", ".join(chosen), train, test, lambda example: example.domain in chosen),
        target=_task(target, train, test, lambda example: example.domain == target),
        split="by domain",
    )


def _split_by_label(
    train: Sequence[Example], test: Sequence[Example], *, target: str | None, sources: Sequence[str]
) -> Transfer:
    for option, value in (("target", target), ("source", ", ".join(sources))):
        if value:
            raise OptionError(option, f"needs a domain column, which the data do not have; found {value!r}")
    labels = sorted({example.label for example in train})
    if len(labels) < 4:
        raise DemoError(
            f"without a domain column the labels are split in half, which needs at least 4, found {', '.join(labels)}"
        )
    first = set(labels[: len(labels) // 2])
    return Transfer(
        source=_task("first half of the labels", train, test, lambda example: example.label in first),
        target=_task("second half of the labels", train, test, lambda example: example.label not in first),
        split="by halves of the sorted labels, because there is no domain column",
    )


def _task(name: str, train: Sequence[Example], test: Sequence[Example], belongs: Callable[[Example], bool]) -> Task:
    """Return the task of the rows that belong to it."""
    train, test = tuple(filter(belongs, train)), tuple(filter(belongs, test))
    labels = sorted({example.label for example in train})
    if len(labels) < 2:
        raise DemoError(f"{name}: a task needs at least two labels, found {', '.join(labels)}")
    if not test:
        raise DemoError(f"{name}: test.tsv has no rows for this task")
    unknown = sorted({example.label for example in test} - set(labels))
    if unknown:
        raise DemoError(f"{name}: test.tsv has labels that are not in train.tsv: {', '.join(unknown)}")
    return Task(name=name, labels=tuple(labels), train=train, test=test)


def draw(examples: Sequence[Example], per_class: int, seed: int) -> list[Example]:
    """Return at most ``per_class`` random rows of each label, sorted by label."""
    by_label: dict[str, list[Example]] = {}
    for example in examples:
        by_label.setdefault(example.label, []).append(example)
    # One generator per label: the rows drawn for a label do not change when another label gets a row.
    return [
        example
        for label, rows in sorted(by_label.items())
        for example in random.Random(f"{seed}/{label}").sample(rows, min(per_class, len(rows)))
    ]


def few_shot(task: Task, shots: int, seed: int) -> list[Example]:
    """Return exactly ``shots`` random training rows of each label.

    Raises:
        OptionError: a label has fewer rows.
    """
    for label in task.labels:
        rows = sum(example.label == label for example in task.train)
        if rows < shots:
            raise OptionError("shots", f"must be at most {rows}, the number of rows of {label!r}; found {shots}")
    return draw(task.train, shots, seed)


def batches(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of row numbers in [0, rows) without end: shuffled epochs, joined and cut into lists of ``size``.

    ``size`` is limited to ``rows``.
    """
    generator = random.Random(seed)
    queue: list[int] = []
    size = min(size, rows)
    while True:
        while len(queue) < size:
            queue.extend(generator.sample(range(rows), rows))
        yield queue[:size]
        del queue[:size]
