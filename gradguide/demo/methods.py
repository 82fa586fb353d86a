"""The methods that the demo compares: ways to make an optimizer for the adaptation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import AdamW, Optimizer

from gradguide import Alignment, GradGuide, SourceGradient
from gradguide.integrations.peft import lora_parameters

__all__ = ["Method", "default_methods", "trainable"]

# Makes an optimizer over the model's trainable parameters (the adapter's and the target head's), for one run.
Method = Callable[[nn.Module, SourceGradient], Optimizer]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What a run trains: the adapter and the target head."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def default_methods(lr: float) -> dict[str, Method]:
    """AdamW alone, and the same AdamW inside GradGuide with the library's defaults."""

    def plain(model: nn.Module, source: SourceGradient) -> Optimizer:
        return AdamW(trainable(model), lr=lr)

    def guided(model: nn.Module, source: SourceGradient) -> Optimizer:
        alignment = Alignment(source.anchored())
        return GradGuide(plain(model, source), alignment=alignment, names=lora_parameters(model))

    return {"AdamW": plain, "GradGuide": guided}
