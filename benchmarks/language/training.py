"""Define the training of a method: optimizer and loss term, and the inputs to create them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.language.model import Language

if TYPE_CHECKING:
    from benchmarks.language.sources import Sources, Spec

__all__ = ["Method", "Setup", "Term", "Training", "clipped", "scheduler"]

_SGD_RATE = 100.0
"""SGD's learning rate relative to AdamW's. With 5 M parameters, an update has about the same length."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A parsed method.

    Args:
        name: a key of ``methods.METHODS``.
        strength: the number after the name.
        options: all options of the method, also those with their default. Options of every method: ``unit``, "token"
            or "row", see ``model.answer_loss``; ``base``, "adamw" or "sgd" (momentum 0.9); ``schedule`` of the learning
            rate, "constant" or "linear", which falls to zero as Trainer's default does.
    """

    name: str
    strength: float
    options: Mapping[str, str]

    @property
    def spec(self) -> Spec:
        """The structured source."""
        from benchmarks.language.sources import Spec

        rank = self.options["rank"]
        return Spec(self.options["text"], count(self.options["tokens"]), None if rank == "whole" else int(rank))


@dataclass(frozen=True, kw_only=True)
class Term:
    """A loss term on source text.

    Args:
        key: names the loss, see ``model.Gradient``.
        weight: factor of the loss.
        loss: called with the tensors of ``inputs``.
        inputs: tensors with one entry per window of text. Each step uses those of ``batch`` random windows.
        every: only each ``every``-th step has the term, the first one included.
    """

    key: str
    weight: float
    loss: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    every: int = 1
    batch: int = 8


@dataclass(frozen=True, kw_only=True)
class Training:
    """Optimizer and loss term of a method, for the steps of one task.

    Args:
        optimizer: makes the step.
        before: called between the gradient and the step.
        after: called after each step with its number, from 1.
        end: called after the last step.
        term: added to the loss.
        held: what the method keeps of source data: anything with tensors in it, see ``measures.bytes_of``.
    """

    optimizer: Optimizer
    before: Callable[[], None] = field(default=lambda: None)
    after: Callable[[int], None] | None = None
    end: Callable[[], None] = field(default=lambda: None)
    term: Term | None = None
    held: Any = None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Inputs to create the training of a method.

    Args:
        kept: what the method remembers of each finished task, or of the base model's text, see ``methods.Entry``.
    """

    model: Language
    sources: Sources
    lr: float
    method: Method
    kept: Sequence[Any] = ()

    def base(self, *, rate: float = 1.0) -> Optimizer:
        """Return the base optimizer at ``rate`` times the learning rate."""
        chosen = self.model.parameters
        if self.method.options["base"] == "sgd":
            return torch.optim.SGD(chosen, lr=rate * self.lr * _SGD_RATE, momentum=0.9)
        fused = self.model.device.type == "cuda"
        return torch.optim.AdamW(chosen, lr=rate * self.lr, weight_decay=0.0, fused=fused)

    def clipped(self, pull: Callable[[], None] = lambda: None, **options: Any) -> Training:
        """Return AdamW on gradients clipped at 1, after ``pull``, which changes them."""
        return clipped(self.base(), pull, **options)


def clipped(base: Optimizer, pull: Callable[[], None] = lambda: None, **options: Any) -> Training:
    """Return ``base`` on gradients clipped at a norm of 1, after ``pull``, which changes them.

    Args:
        options: of ``Training``.
    """
    parameters = [p for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def before() -> None:
        pull()
        nn.utils.clip_grad_norm_(parameters, 1.0)

    return Training(optimizer=base, before=before, **options)


def scheduler(training: Training, method: Method, steps: int) -> LambdaLR | None:
    """Return the scheduler of the learning rate; None where it is constant.

    Raises:
        ValueError: there is no such schedule.
    """
    name = method.options["schedule"]
    if name not in ("constant", "linear"):
        raise ValueError(f"schedule must be 'constant' or 'linear', found {name!r}")
    return LambdaLR(training.optimizer, lambda step: 1 - step / steps) if name == "linear" else None


def count(text: str) -> int:
    """Return a number such as 2k, which is 2048."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)
