"""Episodes and rough data are the same for every method, and test rows are never trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.few_shot.data import episode, outlier_batches, source_task, spikes, wrong_labels


@pytest.mark.parametrize("name", ["clinc150", "banking77", "mr"])
def test_an_episode_has_k_rows_of_each_class_and_depends_on_the_seed_alone(sets: Path, name: str) -> None:
    one, same, other = (episode(sets, name, 2, seed) for seed in (0, 0, 1))
    assert one == same
    assert one.train != other.train
    assert set(Counter(e.label for e in one.train).values()) == {2}
    assert {e.label for e in one.train} == set(one.task.labels)


@pytest.mark.parametrize("seed", range(5))
def test_pool_and_test_rows_were_not_trained_on(sets: Path, seed: int) -> None:
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
def test_wrong_labels_have_the_given_share_and_are_wrong(sets: Path, share: float) -> None:
    few = episode(sets, "banking77", 4, 0)
    spoilt = wrong_labels(few.train, few.task.labels, share, seed=0)
    changed = [(a, b) for a, b in zip(few.train, spoilt, strict=True) if a != b]
    assert len(changed) == round(share * len(few.train))
    assert all(a.text == b.text and a.label != b.label and b.label in few.task.labels for a, b in changed)


def test_spikes_and_outliers_come_at_their_rate_and_are_the_same_for_every_method() -> None:
    factor = spikes(0.1, seed=3)
    found = [factor(step) for step in range(1000)]
    assert found == [factor(step) for step in range(1000)]
    assert set(found) == {1.0, 1000.0}
    assert 60 < found.count(1000.0) < 140

    batch = {"input_ids": torch.arange(12).view(3, 4), "labels": torch.tensor([0, 1, 2])}
    spoil = outlier_batches(0.2, 3, seed=3)
    made = [spoil(step, dict(batch)) for step in range(200)]
    noisy = [b for b in made if not torch.equal(b["input_ids"], batch["input_ids"])]
    assert 20 < len(noisy) < 60
    assert all(torch.equal(b["input_ids"].reshape(-1).sort().values, torch.arange(12)) for b in noisy)
