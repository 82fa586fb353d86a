"""Results whose statistics are known."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.few_shot.grid import CONFIRMING, LRS
from benchmarks.few_shot.methods import BASE

OURS = "GradGuide"


def results(ours: float = 5.0, spread: float = 0.5) -> pd.DataFrame:
    """Transfer on the confirming sets: the base is good at 5e-4 alone; ours is ``ours`` points above it everywhere."""
    generator = np.random.default_rng(0)
    level = dict(zip(LRS, (60.0, 80.0, 70.0, 30.0), strict=True))
    rows = []
    for target in CONFIRMING:
        for seed in range(10):
            for lr in LRS:
                shared = generator.normal()
                for method, gain in ((BASE, 0.0), (OURS, ours)):
                    accuracy = level[lr] + shared + gain + spread * generator.normal()
                    rows.append({
                        "scenario": "transfer", "source": "assistant", "target": target, "condition": "clean",
                        "shots": 4, "method": method, "lr": lr, "seed": seed, "target_accuracy": accuracy / 100,
                        "source_accuracy": (accuracy + 10) / 100, "source_accuracy_before": 0.95,
                        "backward_transfer": np.nan, "coherence": 0.4 + gain / 100, "successive_cosine": 0.1,
                        "alignment": 0.2 - gain / 100, "steps_to_final": 10, "seconds_per_step": 0.1,
                        "memory": 2**20, "diverged": 0, "commit": "abc", "torch": "2",
                    })  # fmt: skip
    return pd.DataFrame(rows)
