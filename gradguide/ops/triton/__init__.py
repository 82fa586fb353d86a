"""The CUDA backend: kernels over a table of addresses. They read rows in place, without gathering.

- ``launch``: launches the kernels that measure and combine. Start here.
- ``launch_adam``: launches the fused step of Adam and AdamW.
- ``operands``: the distinct lists of tensors that rows are computed from.
- ``device_arrays``: integer arrays on the device.
- ``kernels``: the device code.

Measuring reads each row once, or with more than six rows once per six. Combining reads each row once.

Rows are float32, bfloat16 or float16, in any mixture. Sums are float32 within a chunk and float64 across chunks. So
elements whose squares leave the range of float32 count as infinite (above 1e16) or as zero (below 1e-19), as in
``clip_grad_norm_``. Tensors that are not contiguous or are float64 use the portable backend.
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
    """Return the Gram matrices of the rows: Tensor [S, R, R], float64, on the rows' device, deterministic."""
    found = launch_measure(rows)
    return foreach.gram(rows) if found is None else found


@torch.no_grad()
def combine_(rows: Sequence[Row | None], writes: Sequence[Write]) -> None:
    """Write linear combinations of the rows, all computed from the values before any write.

    A row with coefficient 0 is not read, and a write that would add nothing is skipped.
    """
    if not launch_combine(rows, writes):
        foreach.combine_(rows, writes)
