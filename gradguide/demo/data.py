"""Reading a folder of labelled texts, and splitting it into a source task and a target task."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .errors import DemoError, OptionError

__all__ = ["BUILT_IN", "Example", "Task", "Transfer", "read_file", "read_transfer", "split_tasks"]

BUILT_IN = Path(__file__).parent / "texts"

# More source domains make the source task slower to train than a demo should be.
_DEFAULT_SOURCES = 5


class Example(NamedTuple):
    """One row of a file."""

    text: str
    label: str
    domain: str | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task.

    Args:
        name: its domain or domains, for people to read.
        labels: the sorted names of its classes; class i is ``labels[i]``.
        train, test: its rows, in the order of the files.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What the model knows (``source``), what it is to learn (``target``), and how the split was made (``split``)."""

    source: Task
    target: Task
    split: str


def read_transfer(folder: Path, *, target: str | None = None, sources: Sequence[str] = ()) -> Transfer:
    """The tasks in ``folder/train.tsv`` and ``folder/test.tsv``; see ``read_file`` and ``split_tasks``."""
    if not folder.is_dir():
        raise OptionError("data", f"must be a folder with train.tsv and test.tsv, found {str(folder)!r}")
    return split_tasks(read_file(folder / "train.tsv"), read_file(folder / "test.tsv"), target=target, sources=sources)


def read_file(path: Path) -> list[Example]:
    """Rows of a UTF-8 file with a header line and columns separated by a tab: text, label and, optionally, domain.

    Quotation marks have no meaning; other columns are ignored.

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
    wanted = [header.index(column) for column in ("text", "label", "domain") if column in header]
    examples = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:  # a blank line, as at the end of many files
            continue
        fields = [row[index] if index < len(row) else "" for index in wanted]
        if not all(fields):
            raise DemoError(f"{path}, line {number}: expected {', '.join(header[i] for i in wanted)}, found {row}")
        examples.append(Example(fields[0], fields[1], fields[2] if len(fields) == 3 else None))
    return examples


def split_tasks(
    train: Sequence[Example], test: Sequence[Example], *, target: str | None = None, sources: Sequence[str] = ()
) -> Transfer:
    """Source and target task, by domain where the rows have one, else by halves of the sorted labels.

    Args:
        target: the target domain; by default the last in sorted order.
        sources: the source domains; by default the first five others in sorted order.

    Raises:
        DemoError: an unknown domain, or a task with fewer than two classes or without test rows.
    """
    domains = sorted({example.domain for example in train if example.domain is not None})
    if not domains:
        return _split_by_label(train, test, target=target, sources=sources)
    for option, names in (("target", [target] if target is not None else []), ("source", sources)):
        for name in names:
            if name not in domains:
                raise OptionError(option, f"must be one of {', '.join(domains)}; found {name!r}")
    if len(domains) < 2:
        raise DemoError(f"the data have one domain only, {domains[0]!r}: a source and a target need one each")
    aim = domains[-1] if target is None else target
    if aim in sources:
        raise OptionError("source", f"must not name the target domain, found {aim!r}")
    chosen = sorted(set(sources)) or [name for name in domains if name != aim][:_DEFAULT_SOURCES]
    return Transfer(
        source=_task(
            ", ".join(chosen), [e for e in train if e.domain in chosen], [e for e in test if e.domain in chosen]
        ),
        target=_task(aim, [e for e in train if e.domain == aim], [e for e in test if e.domain == aim]),
        split="by domain",
    )


def _split_by_label(
    train: Sequence[Example], test: Sequence[Example], *, target: str | None, sources: Sequence[str]
) -> Transfer:
    for option, value in (("target", target), ("source", ", ".join(sources))):
        if value:
            raise OptionError(option, f"needs a column domain, which the data lack; found {value!r}")
    labels = sorted({example.label for example in train})
    if len(labels) < 4:
        raise DemoError(
            f"without a column domain the labels are split in half, which needs at least 4, found {', '.join(labels)}"
        )
    known = set(labels[: len(labels) // 2])
    return Transfer(
        source=_task("first half of the labels", *([e for e in rows if e.label in known] for rows in (train, test))),
        target=_task(
            "second half of the labels", *([e for e in rows if e.label not in known] for rows in (train, test))
        ),
        split="by halves of the sorted labels, because there is no column domain",
    )


def _task(name: str, train: Sequence[Example], test: Sequence[Example]) -> Task:
    labels = sorted({example.label for example in train})
    if len(labels) < 2:
        raise DemoError(f"{name}: a task needs at least two labels, found {', '.join(labels)}")
    if not test:
        raise DemoError(f"{name}: test.tsv has no rows of it")
    unknown = sorted({example.label for example in test} - set(labels))
    if unknown:
        raise DemoError(f"{name}: test.tsv has labels that train.tsv lacks: {', '.join(unknown)}")
    return Task(name=name, labels=tuple(labels), train=tuple(train), test=tuple(test))
