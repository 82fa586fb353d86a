"""The frontier of a method: the best target value that any of its settings (rates) reaches within a drift.

Its area is the mean of that value over drifts from 0 to 0.3 nats per token. At drift 0 it is the base model's value,
from runs of ``none``. Settings are chosen by their means over (set, seed), so that a method with many settings gains
nothing from the noise of single pairs. Losses above 3 nats count as 3: the words of a label that is not learnt yet have
20 nats, which would leave the first few hundredths of a nat to decide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.language.results import PAIR, cells

__all__ = ["CAP", "Frontier", "area", "frontier", "minus"]

CAP = 0.3
_RESAMPLES = 2000
_DIVERGED = 1e6
"""Drift and loss of a run that diverged, in nats. It is finite, so that a weight of zero leaves it out."""
_ZERO = "none"
_WORST = {"target_accuracy": 0.0, "target_loss": -3.0}
"""The least value that counts, by column; losses are negated."""

Array = npt.NDArray[np.float64]


def area(drift: Array, value: Array, start: Array) -> Array:
    """Return the mean over drifts in [0, CAP] of the best value within that drift.

    Args:
        drift, value: one entry per setting: [..., settings]. Larger values are better. Entries that are not finite are
            never best.
        start: the value at drift 0: [...].
    """
    bad = ~(np.isfinite(drift) & np.isfinite(value))
    drift = np.where(bad, CAP, np.clip(drift, 0.0, CAP))
    value = np.where(bad, -np.inf, value)
    order = np.argsort(drift, axis=-1)
    drift, value = np.take_along_axis(drift, order, -1), np.take_along_axis(value, order, -1)
    best = np.maximum.accumulate(np.concatenate([start[..., None], value], axis=-1), axis=-1)
    edges = np.concatenate([np.zeros_like(drift[..., :1]), drift, np.full_like(drift[..., :1], CAP)], axis=-1)
    widths = np.diff(edges, axis=-1)
    products: Array = np.where(widths > 0, widths * np.where(widths > 0, best, 0.0), 0.0)
    total: Array = products.sum(-1) / CAP
    return total


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The frontier of one family of methods.

    Args:
        pairs: the pairs (target, seed) that have all settings.
        points: method, lr, drift and value of each setting, means over the pairs.
        start: value of the base model, mean over the pairs.
        value: the area.
        drifts, values, starts: of each pair: [pairs, settings] and [pairs]. Losses are negated.
        least: the least value that counts.
    """

    pairs: list[tuple[str, int]]
    points: pd.DataFrame
    start: float
    value: float
    drifts: Array
    values: Array
    starts: Array
    least: float

    def resampled(self, weights: Array) -> Array:
        """Return the area for each row of weights [resamples, pairs], which sum to 1."""
        values, starts = (np.maximum(weights @ part, self.least) for part in (self.values, self.starts))
        return area(weights @ self.drifts, values, starts)


def frontier(rows: pd.DataFrame, family: str, column: str) -> Frontier | None:
    """Return the frontier of a family, or None if no pair has all its settings and a run of ``none``.

    Settings with less than half of the pairs of the others are left out: a grid may have been stopped early. A run
    that diverged, whose drift and loss are nan, is beyond every drift.

    Args:
        column: "target_accuracy", or "target_loss", which is negated.
    """
    sign = -1.0 if column == "target_loss" else 1.0
    mine, zero = rows[rows["family"] == family], rows[rows["method"] == _ZERO]
    counts = mine.groupby(["method", "lr"])["seed"].transform("count")
    mine = mine[counts >= 0.5 * counts.max()]
    mine = mine.fillna({"drift": _DIVERGED, "target_loss": _DIVERGED})
    drift, value = cells(mine, "drift"), cells(mine, column)
    start = zero.groupby(PAIR)[column].mean()
    whole = value.dropna().index.intersection(drift.dropna().index).intersection(start.dropna().index)
    if whole.empty:
        return None
    drifts, values = drift.loc[whole].to_numpy(float), sign * value.loc[whole].to_numpy(float)
    starts = sign * start.loc[whole].to_numpy(float)
    points = pd.DataFrame({"drift": drift.loc[whole].mean(), "value": value.loc[whole].mean()}).reset_index()
    found = Frontier(
        pairs=list(whole), points=points, start=sign * float(starts.mean()), value=0.0, drifts=drifts, values=values,
        starts=starts, least=_WORST[column],
    )  # fmt: skip
    return replace(found, value=sign * float(found.resampled(np.full((1, len(whole)), 1 / len(whole)))[0]))


def minus(one: Frontier, other: Frontier, column: str) -> tuple[float, float, float, int]:
    """Return area of ``one`` minus that of ``other`` on the same pairs, its 95% interval, and the number of pairs.

    The pairs are resampled together for both (percentile bootstrap). Without a common pair all are nan.
    """
    sign = -1.0 if column == "target_loss" else 1.0
    shared = [pair for pair in one.pairs if pair in set(other.pairs)]
    if not shared:
        return np.nan, np.nan, np.nan, 0
    parts = [_on(each, shared) for each in (one, other)]
    weights = np.full((1, len(shared)), 1 / len(shared))
    drawn = np.random.default_rng(0).multinomial(len(shared), weights[0], size=_RESAMPLES) / len(shared)
    mean = sign * (parts[0].resampled(weights) - parts[1].resampled(weights))[0]
    low, high = np.quantile(sign * (parts[0].resampled(drawn) - parts[1].resampled(drawn)), [0.025, 0.975])
    return float(mean), float(low), float(high), len(shared)


def _on(part: Frontier, pairs: list[tuple[str, int]]) -> Frontier:
    index = [part.pairs.index(pair) for pair in pairs]
    return replace(part, pairs=pairs, drifts=part.drifts[index], values=part.values[index], starts=part.starts[index])
