"""Episodes: the same for every method, and without the rows that judge them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.few_shot.texts import episode, source_task, spoil_labels


@pytest.mark.parametrize("name", ["clinc150", "banking77", "mr"])
def test_an_episode_has_k_rows_of_each_class_and_depends_on_the_seed_alone(sets: Path, name: str) -> None:
    one, same, other = (episode(sets, name, 2, seed) for seed in (0, 0, 1))
    assert one == same
    assert one.train != other.train
    assert set(Counter(e.label for e in one.train).values()) == {2}
    assert {e.label for e in one.train} == set(one.task.labels)


@pytest.mark.parametrize("seed", range(5))
def test_pool_and_test_rows_are_none_that_were_trained_on(sets: Path, seed: int) -> None:
    few = episode(sets, "banking77", 4, seed)
    assert not set(few.train) & {*few.pool, *few.task.test, *few.probe}
    assert set(few.probe) <= set(few.task.test)
    assert len(few.task.labels) == 15


def test_the_source_shares_no_domain_with_any_target_of_its_set(sets: Path) -> None:
    source = source_task(sets, "assistant")
    targets = [episode(sets, "clinc150", 1, seed) for seed in range(6)]
    assert len({e.domain for e in source.train}) == 5
    assert {e.domain for few in targets for e in few.train} == {"domain5", "domain6"}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_wrong_labels_are_as_many_as_asked_for_and_are_wrong(sets: Path, share: float) -> None:
    few = episode(sets, "banking77", 4, 0)
    spoilt = spoil_labels(few.train, few.task.labels, share, seed=0)
    changed = [(a, b) for a, b in zip(few.train, spoilt, strict=True) if a != b]
    assert len(changed) == round(share * len(few.train))
    assert all(a.text == b.text and a.label != b.label and b.label in few.task.labels for a, b in changed)
