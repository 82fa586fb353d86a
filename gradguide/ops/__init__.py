"""Passes over the rows: ``gram`` measures them, ``combine_`` writes combinations of them. They know no rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradguide.checks import check_choice
from gradguide.ops import cpu, foreach
from gradguide.ops.row import Row, Write

__all__ = ["Ops", "Row", "Write", "check_backend", "select"]


class Ops(Protocol):
    """What a backend offers; ``gradguide.ops.reference`` says what the results must be."""

    def gram(self, rows: Sequence[Row | None]) -> Tensor: ...

    def combine_(self, rows: Sequence[Row | None], writes: Sequence[Write]) -> None: ...


def check_backend(backend: str) -> None:
    """Raise if ``backend`` is no backend's name, or cannot be had."""
    check_choice("backend", backend, ("auto", "foreach", "triton"))
    if backend == "triton":
        raise NotImplementedError("backend='triton' is not in this version; backend='auto' takes the fastest there is")


def select(backend: str, device: torch.device) -> Ops:
    """The backend for tensors on ``device``: "auto" has its own for the CPU, "foreach" runs anywhere."""
    return cpu if backend == "auto" and device.type == "cpu" else foreach
