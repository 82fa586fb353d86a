from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from gradguide.demo.data import Example, read_transfer
from gradguide.demo.errors import OptionError
from gradguide.demo.sampling import batches, draw, few_shot


def test_few_shot_takes_k_of_each_label_by_seed(data: Path) -> None:
    task = read_transfer(data).target
    sample = few_shot(task, 4, seed=1)
    assert Counter(example.label for example in sample) == {"gull": 4, "wave": 4}
    assert len(set(sample)) == 8
    assert sample == few_shot(task, 4, seed=1)
    assert sample != few_shot(task, 4, seed=2)


def test_few_shot_needs_k_rows(data: Path) -> None:
    with pytest.raises(OptionError, match="--shots must be at most 6, the training rows of 'gull'; found 7"):
        few_shot(read_transfer(data).target, 7, seed=0)


def test_draw_of_a_label_does_not_depend_on_others() -> None:
    a, b = ([Example(f"{label}{i}", label, None) for i in range(20)] for label in "ab")
    assert draw(a, 5, 0) == draw([*b, *a], 5, 0)[:5]
    assert len(draw(a, 50, 0)) == 20


def test_batches_cover_every_row_in_each_pass() -> None:
    stream = [row for batch in islice(batches(6, 4, seed=0), 9) for row in batch]
    assert [sorted(stream[i : i + 6]) for i in range(0, 36, 6)] == [list(range(6))] * 6
    assert stream == [row for batch in islice(batches(6, 4, seed=0), 9) for row in batch]
    assert sorted(next(batches(3, 16, seed=0))) == [0, 1, 2]
