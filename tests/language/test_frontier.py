"""The area under a frontier, and its paired interval, on points whose answers are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks.language.frontier import CAP, area, frontier, minus


def _rows(values: dict[str, list[tuple[float, float, float]]], noise: float = 0.0) -> pd.DataFrame:
    """Return rows of methods with (rate, drift, accuracy) on 12 pairs, and of the untrained model at 40%."""
    generator = np.random.default_rng(0)
    found = []
    for target in ("subj", "hwu64"):
        for seed in range(6):
            level = float(generator.normal()) * noise
            found.append(("none", "none", 0.0, target, seed, 0.0, 40.0 + level))
            for method, points in values.items():
                for lr, drift, accuracy in points:
                    found.append((method, method, lr, target, seed, drift, accuracy + level))
    columns = ["method", "family", "lr", "target", "seed", "drift", "target_accuracy"]
    return pd.DataFrame(found, columns=columns)


def test_the_area_is_the_mean_of_the_best_value_within_each_drift() -> None:
    drift, value = np.array([0.2, 0.1, 0.25, 0.9]), np.array([70.0, 60.0, 65.0, 99.0])
    # 40 to 0.1, then 60 to 0.2, then 70; the worse point at 0.25 and the one beyond the cap change nothing.
    assert float(area(drift, value, np.array(40.0))) == pytest.approx((40 + 60 + 70) / 3)
    assert float(area(drift * np.inf, value, np.array(40.0))) == pytest.approx(40.0)
    assert float(area(drift, value * np.nan, np.array(40.0))) == pytest.approx(40.0)
    assert float(area(np.array([0.0]), np.array([50.0]), np.array(40.0))) == pytest.approx(50.0)


def test_a_frontier_is_made_of_means_over_pairs() -> None:
    rows = _rows({"kl": [(1e-3, 0.1, 60.0), (1e-2, 0.2, 70.0)]}, noise=5.0)
    found = frontier(rows, "kl", "target_accuracy")
    assert found is not None
    start = rows[rows["method"] == "none"]["target_accuracy"].mean()
    assert found.start == pytest.approx(start)
    assert found.value == pytest.approx((3 * start + 20 + 30) / 3)
    assert len(found.pairs) == 12


def test_differences_of_areas_are_paired() -> None:
    rows = _rows({"kl": [(1e-3, 0.1, 60.0)], "structured": [(1e-3, 0.05, 60.0)]}, noise=5.0)
    ours, other = (frontier(rows, name, "target_accuracy") for name in ("structured", "kl"))
    assert ours is not None
    assert other is not None
    mean, low, high, pairs = minus(ours, other, "target_accuracy")
    # The level of a pair is in the untrained model too, so that the difference is 20 points over 0.05 nats.
    assert (mean, low, high) == pytest.approx((20 * 0.05 / CAP,) * 3)
    assert pairs == 12


def test_losses_are_better_when_they_are_less_and_count_up_to_three() -> None:
    rows = _rows({"kl": [(1e-3, 0.1, 1.0)], "clip": [(1e-3, 0.2, 1.0)]}).rename(
        columns={"target_accuracy": "target_loss"}
    )
    one, other = (frontier(rows, name, "target_loss") for name in ("kl", "clip"))
    assert one is not None
    assert other is not None
    assert one.value == pytest.approx((3 * 0.1 + 1 * 0.2) / CAP)
    mean, low, high, _ = minus(one, other, "target_loss")
    assert (mean, low, high) == pytest.approx((-2 * 0.1 / CAP,) * 3)


def test_a_setting_that_diverged_is_beyond_every_drift() -> None:
    points = [(3e-4, 0.05, 50.0), (1e-3, 0.1, 60.0), (1e-2, 0.1, 90.0)]
    rows = _rows({"kl": points, "clip": points[:2]}).assign(target_loss=1.0)
    diverged = (rows["method"] == "kl") & (rows["lr"] == 1e-2)
    for where in (diverged, diverged & (rows["seed"] == 0)):  # all runs, or a few
        part = rows.copy()
        part.loc[where, ["drift", "target_loss"]] = np.nan
        for column in ("target_accuracy", "target_loss"):
            one, other = (frontier(part, name, column) for name in ("kl", "clip"))
            assert one is not None
            assert other is not None
            assert len(one.pairs) == 12
            assert one.value == pytest.approx(other.value)
            # A resample without the pairs that diverged has the setting.
            assert minus(one, other, column)[0] == pytest.approx(0.0)


def test_settings_with_few_runs_are_left_out() -> None:
    rows = _rows({"kl": [(1e-3, 0.1, 60.0), (1e-2, 0.01, 90.0)]})
    late = rows[(rows["lr"] == 1e-2) & (rows["seed"] > 0)].index
    found = frontier(rows.drop(late), "kl", "target_accuracy")
    assert found is not None
    assert list(found.points["lr"]) == [1e-3]
    assert frontier(rows[rows["method"] != "none"], "kl", "target_accuracy") is None
