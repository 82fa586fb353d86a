"""Passes over the rows: ``gram`` measures them, ``combine_`` writes combinations of them. They know no rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradguide.checks import check_choice
from gradguide.ops import foreach
from gradguide.ops.available import lacks_triton
from gradguide.ops.row import Row, Stack, Write

__all__ = ["Ops", "Row", "Stack", "Write", "check_backend", "is_fused", "select"]


class Ops(Protocol):
    """What a backend offers; ``gradguide.ops.reference`` says what the results must be.

    Rows are those of one bucket. A plain list of them has one scope, a Stack may have several.
    """

    def gram(self, rows: Sequence[Row | None]) -> Tensor: ...

    def combine_(self, rows: Sequence[Row | None], writes: Sequence[Write]) -> None: ...


def check_backend(backend: str, devices: Iterable[torch.device] = ()) -> None:
    """Raise if ``backend`` cannot be had for tensors on ``devices``.

    Raises:
        ValueError: it is no backend's name.
        RuntimeError: it was asked for by name, and something that it needs is missing, which the message names.
    """
    check_choice("backend", backend, ("auto", "foreach", "triton"))
    if backend == "triton":
        for device in devices:
            missing = lacks_triton(device)
            if missing is not None:
                raise RuntimeError(f"backend='triton' cannot be had: {missing}; use backend='auto'")


def is_fused(backend: str, device: torch.device) -> bool:
    """Whether tensors on ``device`` take the fused kernels."""
    return backend == "triton" or (backend == "auto" and device.type == "cuda" and lacks_triton(device) is None)


def select(backend: str, device: torch.device) -> Ops:
    """The backend for tensors on ``device``.

    "auto" takes the fused kernels on CUDA where they can run, and the portable backend elsewhere. "foreach" is the
    portable one, "triton" the fused kernels.

    Raises:
        RuntimeError: backend "triton" cannot be had for ``device``, or that is the meta device.
    """
    if device.type == "meta":
        raise RuntimeError(
            "parameters lie on the meta device, which holds no numbers: materialise the model (to_empty, or load its "
            "weights) before step()"
        )
    check_backend(backend, [device])
    if is_fused(backend, device):
        from gradguide.ops import triton

        return triton
    return foreach
