"""Passes over the rows of a step: ``gram`` measures them, ``combine_`` writes linear combinations. No rules.

- ``row``: a vector over the tensors of a bucket, and what is written. Start here.
- ``reference``: plain loops in float64, which define the result of every backend.
- ``foreach``: the portable backend, with the passes for accelerators. It leaves those on a CPU to ``cpu``. Both split
  tensors with ``blocks``.
- ``triton``: the fused kernels for CUDA. ``available`` checks whether they can run.
- ``rounding``: error bounds of each backend's products. They decide what counts as zero.
- ``tensors`` (metadata of lists of tensors) and ``allocate`` (contiguous memory) are helpers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradguide.ops import foreach
from gradguide.ops.available import lacks_triton
from gradguide.ops.row import Row, Stack, Write
from gradguide.utils.checks import check_choice

__all__ = ["Ops", "Row", "Stack", "Write", "check_backend", "is_fused", "select"]


class Ops(Protocol):
    """The interface of a backend; ``gradguide.ops.reference`` defines the results.

    Rows are those of one bucket. A plain list has one scope, a Stack may have several.
    """

    def gram(self, rows: Sequence[Row | None]) -> Tensor: ...

    def combine_(self, rows: Sequence[Row | None], writes: Sequence[Write]) -> None: ...


def check_backend(backend: str, devices: Iterable[torch.device] = ()) -> None:
    """Raise if ``backend`` is not available for tensors on ``devices``.

    Raises:
        ValueError: the backend does not exist.
        RuntimeError: the backend is "triton" and a requirement is missing; the message names it.
    """
    check_choice("backend", backend, ("auto", "foreach", "triton"))
    if backend == "triton":
        for device in devices:
            missing = lacks_triton(device)
            if missing is not None:
                raise RuntimeError(f"backend='triton' is not available: {missing}; use backend='auto'")


def is_fused(backend: str, device: torch.device) -> bool:
    """Return whether tensors on ``device`` use the fused kernels."""
    return backend == "triton" or (backend == "auto" and device.type == "cuda" and lacks_triton(device) is None)


def select(backend: str, device: torch.device) -> Ops:
    """Return the backend for tensors on ``device``.

    "auto" selects the fused kernels on CUDA if they can run, else the portable backend. "foreach" is the portable
    backend, "triton" the fused kernels.

    Raises:
        RuntimeError: backend "triton" cannot run on ``device``, or that is the meta device.
    """
    check_backend(backend, [device])
    if device.type == "meta":
        raise RuntimeError(
            "parameters are on the meta device, which holds no numbers: materialise the model (to_empty, or load its "
            "weights) before step()"
        )
    if is_fused(backend, device):
        from gradguide.ops import triton

        return triton
    return foreach
