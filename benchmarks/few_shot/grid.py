"""List the runs of the full and the quick grid, in the order in which they are made.

Seeds are the outermost loop, so a grid that is stopped early has every cell, with fewer seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.few_shot.data import CONDITIONS
from benchmarks.few_shot.methods import BASE, HEAD_ONLY, METHODS

__all__ = [
    "CONFIRMING",
    "DEVELOPING",
    "EVERY_METHOD",
    "LRS",
    "MAIN",
    "ONE_RATE",
    "SECONDS",
    "SEQUENCES",
    "SHOT_SETS",
    "Run",
    "full",
    "quick",
]

DEVELOPING = ("clinc150", "banking77", "mr", "snli")
"""The sets on which defaults were chosen."""
CONFIRMING = ("hwu64", "goemotions", "subj", "medical_abstracts")
"""The sets on which they were evaluated afterwards."""

SEQUENCES = {
    "confirming": ("hwu64", "goemotions", "subj", "hwu64", "goemotions"),
    "developing": ("clinc150", "banking77", "mr", "clinc150", "banking77"),
}
"""Sets of the five tasks of a sequence. A set that occurs twice gives other classes the second time."""

LRS = (1e-4, 5e-4, 2e-3, 1e-2)
SHOTS = (1, 2, 4, 8, 16, 32)
ONE_RATE = "one rate"
"""The condition under which a new head trains at the adapter's learning rate instead of its own."""
_SHOTS = 4  # unless shots are what is studied
_SEEDS = range(10)
_LOWER = f"{BASE}, rate / 4"
MAIN = (BASE, _LOWER, HEAD_ONLY, "L2-SP", "EWC", "A-GEM", "GG direction+magnitude", "GradGuide")
EVERY_METHOD = ("banking77", "hwu64")
"""One set of each half, on which every method runs; the others have the methods of ``MAIN`` only."""
SHOT_SETS = ("hwu64",)
_SEQUENCE_METHODS = (BASE, _LOWER, HEAD_ONLY, "L2-SP", "EWC", "A-GEM", "GradGuide")
_FEW = (BASE, HEAD_ONLY, "EWC", "GradGuide")
_ONE_RATE_METHODS = (BASE, HEAD_ONLY, "L2-SP", "EWC", "GradGuide")
_ROUGH_METHODS = ("AdamW", BASE, HEAD_ONLY, "ZClip", "GG magnitude", "GradGuide")
_ROUGH_SETS = ("hwu64",)
_ROUGH_LRS = (5e-4, 2e-3)
_CROSS = (("films", "goemotions"), ("home", "banking77"), ("home", "medical_abstracts"))

SECONDS = {"transfer": 8.0, "cross": 9.0, "rough": 7.0, "sequence": 56.0, "digits": 0.1}
"""Approximate seconds of a run in one thread of a 2-core machine, by scenario."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run. Its fields are its key in the results.

    Args:
        scenario: transfer, cross, rough, sequence or digits.
        source: name of the source task; "none" in sequences.
        target: name of the target's set; in sequences, a key of ``SEQUENCES``.
        condition: a key of ``data.CONDITIONS``, "one rate" for head and adapter at one rate, or "clean".
        shots: training rows per class.
        method: a name in ``METHODS``.
        lr: learning rate of the adapter.
        seed: of the classes, rows, head and order.
    """

    scenario: str
    source: str
    target: str
    condition: str
    shots: int
    method: str
    lr: float
    seed: int


def full() -> list[Run]:
    """Return every cell for every seed."""
    return [
        run
        for seed in _SEEDS
        for run in (
            *_transfer(CONFIRMING, MAIN, LRS, seed),
            *_every(seed),
            *_sequence("confirming", seed),
            *_rough(seed),
            *_digits(SHOTS, METHODS, LRS, seed),
            *_shots(seed),
            *_cross(seed),
            *_transfer(CONFIRMING, _ONE_RATE_METHODS, LRS, seed, condition=ONE_RATE),
            *_developing(seed),
        )
    ]


def quick() -> list[Run]:
    """Return a few cells for three seeds: one small source, one target, and the digits."""
    methods = (BASE, "EWC", "GradGuide")
    return [
        run
        for seed in range(3)
        for run in (
            *(
                Run(scenario="cross", source="films", target="goemotions", condition="clean", shots=_SHOTS,
                    method=method, lr=lr, seed=seed)
                for lr in (5e-4, 1e-2) for method in methods
            ),
            *_digits((_SHOTS,), methods, LRS, seed),
        )
    ]  # fmt: skip


def _points(methods: Iterable[str], lrs: Iterable[float], condition: str = "clean") -> list[tuple[float, str]]:
    """Return (rate, method) pairs. A head with its own rate does not depend on the adapter's: one rate is enough."""
    lrs = tuple(lrs)
    return [
        (lr, method) for lr in lrs for method in methods if method != HEAD_ONLY or lr == lrs[0] or condition == ONE_RATE
    ]


def _transfer(
    sets: Iterable[str],
    methods: Iterable[str],
    lrs: Iterable[float],
    seed: int,
    *,
    shots: int = _SHOTS,
    condition: str = "clean",
) -> list[Run]:
    methods = tuple(methods)
    return [
        Run(scenario="transfer", source="assistant", target=target, condition=condition, shots=shots, method=method,
            lr=lr, seed=seed)
        for target in sets for lr, method in _points(methods, lrs, condition)
    ]  # fmt: skip


def _shots(seed: int) -> list[Run]:
    return [run for shots in SHOTS if shots != _SHOTS for run in _transfer(SHOT_SETS, _FEW, LRS, seed, shots=shots)]


def _cross(seed: int) -> list[Run]:
    return [
        Run(scenario="cross", source=source, target=target, condition="clean", shots=_SHOTS, method=method, lr=lr,
            seed=seed)
        for source, target in _CROSS for lr, method in _points(_FEW, LRS)
    ]  # fmt: skip


def _rough(seed: int) -> list[Run]:
    return [
        Run(scenario="rough", source="assistant", target=target, condition=condition, shots=_SHOTS, method=method,
            lr=lr, seed=seed)
        for target in _ROUGH_SETS for condition in CONDITIONS for lr, method in _points(_ROUGH_METHODS, _ROUGH_LRS)
    ]  # fmt: skip


def _sequence(half: str, seed: int) -> list[Run]:
    return [
        Run(scenario="sequence", source="none", target=half, condition="clean", shots=_SHOTS, method=method, lr=lr,
            seed=seed)
        for lr, method in _points(_SEQUENCE_METHODS, LRS)
    ]  # fmt: skip


def _every(seed: int) -> list[Run]:
    """Return every method on one set of each half, without those that run on the confirming sets anyway."""
    others = [method for method in METHODS if method not in MAIN]
    return [
        run
        for target in EVERY_METHOD
        for run in _transfer([target], others if target in CONFIRMING else METHODS, LRS, seed)
    ]


def _developing(seed: int) -> list[Run]:
    sets = [target for target in DEVELOPING if target not in EVERY_METHOD]
    return [*_transfer(sets, MAIN, LRS, seed), *_sequence("developing", seed)]


def _digits(shots: Iterable[int], methods: Iterable[str], lrs: Iterable[float], seed: int) -> list[Run]:
    methods = tuple(methods)
    return [
        Run(scenario="digits", source="digits 0-4", target="digits 5-9", condition="clean", shots=k, method=method,
            lr=lr, seed=seed)
        for k in shots for lr, method in _points(methods, lrs)
    ]  # fmt: skip
