"""Rough data: wrong labels, tiny batches, batches of something else, and spikes of the gradient."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CONDITIONS", "Rough", "outlier_batches", "spikes"]


@dataclass(frozen=True, kw_only=True)
class Rough:
    """
    Args:
        wrong_labels: share of the training rows with a wrong label, in [0, 1].
        batch: rows per step.
        outliers: chance that a step's batch is noise: shuffled words, drawn labels.
        spikes: chance that a step's loss, and so its gradient, is 1000 times too large, as a bad fp16 scale makes it.
    """

    wrong_labels: float = 0.0
    batch: int = 8
    outliers: float = 0.0
    spikes: float = 0.0


CONDITIONS: dict[str, Rough] = {
    "20% wrong labels": Rough(wrong_labels=0.2),
    "40% wrong labels": Rough(wrong_labels=0.4),
    "batch 1": Rough(batch=1),
    "batch 2": Rough(batch=2),
    "outlier batches": Rough(outliers=0.1),
    "spikes": Rough(spikes=0.1),
}

_SPIKE = 1000.0


def spikes(chance: float, seed: int) -> Callable[[int], float]:
    """Factor of the loss by step: 1000 with the given chance, else 1; the same for every method."""
    return lambda step: _SPIKE if random.Random(f"spike/{seed}/{step}").random() < chance else 1.0


def outlier_batches(chance: float, classes: int, seed: int) -> Callable[[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Turns the batch of a step, with the given chance, into noise: tokens shuffled over the batch, labels drawn."""

    def spoil(step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if random.Random(f"outlier/{seed}/{step}").random() >= chance:
            return batch
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        ids, labels = batch["input_ids"], batch["labels"]
        order = torch.randperm(ids.numel(), generator=generator).to(ids.device)
        drawn = torch.randint(classes, labels.shape, generator=generator).to(labels.device)
        return {**batch, "input_ids": ids.reshape(-1)[order].view_as(ids), "labels": drawn}

    return spoil
