"""The CUDA backend: kernels over a table of addresses, which read every row once, in place and without gathering.

(Where there are more than six rows, measuring reads each once per six.)

Rows are float32, bfloat16 or float16, in any mixture. Sums are float32 within a chunk and float64 across chunks, so
elements whose squares leave the range of float32 (beyond 1e16, below 1e-19) count as infinite, or not at all, as
they do in ``clip_grad_norm_``. Tensors that are not contiguous, or of float64, take the portable backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradguide.ops import foreach
from gradguide.ops.row import Row, Write
from gradguide.ops.triton.launch import launch_combine, launch_measure

__all__ = ["combine_", "gram"]


@torch.no_grad()
def gram(rows: Sequence[Row | None]) -> Tensor:
    """Gram matrices of the rows: Tensor [S, R, R], float64, on the rows' device, the same bits for the same rows."""
    found = launch_measure(rows)
    return foreach.gram(rows) if found is None else found


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all of them computed from the rows as they were before.

    A coefficient of 0 leaves its row unread, and a write that would add nothing is not made.
    """
    if not launch_combine(rows, writes):
        foreach.combine_(rows, writes)
