"""Compute what methods store about a finished task, or about the base model's source text before training."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from benchmarks.language.data import Rows, answer_batches
from benchmarks.language.model import Language
from gradguide import SourceGradient, StructuredSource
from gradguide.integrations.peft import lora_parameters
from gradguide.integrations.sampling import sampled_loss

__all__ = ["Batches", "anchored", "diagonal", "rows_of", "structured"]

Batches = list[dict[str, Tensor]]
_BATCH = 8


def rows_of(rows: Rows, device: torch.device) -> Batches:
    """Return training rows as batches for ``sampled_loss``: labels are drawn where the answers are."""
    return list(answer_batches(rows.pairs, _BATCH, device))


def diagonal(model: Language, batches: Batches) -> SourceGradient:
    """Return the diagonal Fisher information of A and B in nats per token, for EWC."""
    found, per_row = _captured(model, batches)
    fisher = {name: value / per_row for name, value in found.fisher.items()}
    return SourceGradient(None, fisher=fisher, anchor=found.anchor, metadata=found.metadata)


def anchored(model: Language, batches: Batches) -> SourceGradient:
    """Return GradGuide's pull to the present A and B, see ``SourceGradient.anchored``."""
    return _captured(model, batches)[0].anchored()


def structured(model: Language, batches: Batches, rank: int | None) -> StructuredSource:
    """Return a structured source, with labels drawn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*received fewer.*", category=UserWarning)
        return StructuredSource.capture(model.model, batches, sampled_loss, rank=rank)


def _captured(model: Language, batches: Batches) -> tuple[SourceGradient, float]:
    """Return a source, and the mean number of predictions of a row. Its loss is that of whole rows, labels drawn."""
    predictions, rows = 0, 0

    def drawn(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal predictions, rows
        loss, number = sampled_loss(module, batch)
        predictions, rows = predictions + number, rows + len(batch["input_ids"])
        return loss * (number / len(batch["input_ids"]))

    with warnings.catch_warnings():
        # A of a fresh adapter has no gradient.
        warnings.filterwarnings("ignore", message=".*LoRA A matrices is zero.*", category=UserWarning)
        found = SourceGradient.capture(model.model, batches, drawn, curvature=drawn, names=lora_parameters(model.model))
    model.clear()
    return found, predictions / rows
