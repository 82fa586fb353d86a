"""Which runs there are: the full grid and the quick one, in the order in which they are made.

Seeds are the outermost loop, so that a grid that is stopped early has every cell, with fewer seeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.few_shot.methods import BASE, HEAD_ONLY, METHODS
from benchmarks.few_shot.rough import CONDITIONS

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
    "candidates",
    "full",
    "quick",
]

DEVELOPING = ("clinc150", "banking77", "mr", "snli")
"""The sets on which defaults were chosen."""
CONFIRMING = ("hwu64", "goemotions", "subj", "medical_abstracts")
"""The sets on which they were then judged."""

SEQUENCES = {
    "confirming": ("hwu64", "goemotions", "subj", "hwu64", "goemotions"),
    "developing": ("clinc150", "banking77", "mr", "clinc150", "banking77"),
}
"""Sets of the five tasks of a sequence; the second time round, a set gives other classes."""

LRS = (1e-4, 5e-4, 2e-3, 1e-2)
SHOTS = (1, 2, 4, 8, 16, 32)
ONE_RATE = "one rate"
"""The condition under which a new head trains at the adapter's rate, and not at one of its own."""
_SHOTS = 4  # where shots are not what is studied
_SEEDS = range(10)
_LOWER = f"{BASE}, rate / 4"
MAIN = (BASE, _LOWER, HEAD_ONLY, "L2-SP", "EWC", "A-GEM", "GG direction+magnitude", "GradGuide")
EVERY_METHOD = ("banking77", "hwu64")
"""A set of each half, on which every method runs; on the others only the main ones."""
SHOT_SETS = ("hwu64",)
_SEQUENCE_METHODS = (BASE, _LOWER, HEAD_ONLY, "L2-SP", "EWC", "A-GEM", "GradGuide")
_FEW = (BASE, HEAD_ONLY, "EWC", "GradGuide")
_ONE_RATE_METHODS = (BASE, HEAD_ONLY, "L2-SP", "EWC", "GradGuide")
_ROUGH_METHODS = ("AdamW", BASE, HEAD_ONLY, "ZClip", "GG magnitude", "GradGuide")
_ROUGH_SETS = ("hwu64",)
_ROUGH_LRS = (5e-4, 2e-3)
_CROSS = (("films", "goemotions"), ("home", "banking77"), ("home", "medical_abstracts"))

SECONDS = {"transfer": 8.0, "cross": 9.0, "rough": 7.0, "sequence": 56.0, "digits": 0.1, "causal": 60.0}
"""About what a run takes in one thread of a 2-core machine, by scenario; for the estimate before the start."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; its fields are its key in the results.

    Args:
        scenario: transfer, cross, rough, sequence, digits or causal.
        source: name of the source task; "none" in sequences.
        target: name of the target's set; in sequences that of the half whose sets are learnt one after the other.
        condition: what is rough about the data, or "one rate" for head and adapter alike; "clean" otherwise.
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


def full(*, causal: bool = False) -> list[Run]:
    """Every cell; ``causal`` adds runs of a causal language model."""
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
            *(_causal(seed) if causal else ()),
            *_developing(seed),
        )
    ]


def candidates(names: Iterable[str]) -> list[Run]:
    """The candidates ``names`` beside what they are compared with, on developing sets and seeds of their own."""
    methods = (BASE, _LOWER, "GG direction+magnitude", "GradGuide", *names)
    sets = ("clinc150", "banking77", "snli")
    return [
        run
        for seed in range(10, 13)
        for run in (*_transfer(sets, methods, LRS, seed), *_transfer(sets[:1], methods, LRS, seed, condition=ONE_RATE))
    ]


def quick() -> list[Run]:
    """A few cells of three seeds: one small source, one target, and the digits."""
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


def _tried(methods: Iterable[str], lrs: Iterable[float], condition: str = "clean") -> list[tuple[float, str]]:
    """Rates and methods; the head alone, whose own rate does not change, runs at the first rate only."""
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
        for target in sets for lr, method in _tried(methods, lrs, condition)
    ]  # fmt: skip


def _shots(seed: int) -> list[Run]:
    return [run for shots in SHOTS if shots != _SHOTS for run in _transfer(SHOT_SETS, _FEW, LRS, seed, shots=shots)]


def _cross(seed: int) -> list[Run]:
    return [
        Run(scenario="cross", source=source, target=target, condition="clean", shots=_SHOTS, method=method, lr=lr,
            seed=seed)
        for source, target in _CROSS for lr, method in _tried(_FEW, LRS)
    ]  # fmt: skip


def _causal(seed: int) -> list[Run]:
    return [
        Run(scenario="causal", source="assistant", target=target, condition="clean", shots=_SHOTS, method=method, lr=lr,
            seed=seed)
        for target in DEVELOPING + CONFIRMING for lr in LRS for method in MAIN if method != HEAD_ONLY
    ]  # fmt: skip


def _rough(seed: int) -> list[Run]:
    return [
        Run(scenario="rough", source="assistant", target=target, condition=condition, shots=_SHOTS, method=method,
            lr=lr, seed=seed)
        for target in _ROUGH_SETS for condition in CONDITIONS for lr, method in _tried(_ROUGH_METHODS, _ROUGH_LRS)
    ]  # fmt: skip


def _sequence(half: str, seed: int) -> list[Run]:
    return [
        Run(scenario="sequence", source="none", target=half, condition="clean", shots=_SHOTS, method=method, lr=lr,
            seed=seed)
        for lr, method in _tried(_SEQUENCE_METHODS, LRS)
    ]  # fmt: skip


def _every(seed: int) -> list[Run]:
    """Every method on a set of each half, but for what runs on the confirming sets anyway."""
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
        for k in shots for lr, method in _tried(methods, lrs)
    ]  # fmt: skip
