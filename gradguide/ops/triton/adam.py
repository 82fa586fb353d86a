"""Launching the fused step of Adam and AdamW."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguide.ops.row import Row, Write
from gradguide.ops.triton.columns import Columns, columns_of
from gradguide.ops.triton.kernels.adam import adam
from gradguide.ops.triton.launch import (
    CHUNK,
    FUSION,
    REGISTERS,
    WARPS,
    WIDE,
    WIDE_BLOCK,
    WIDEST_BLOCK,
    on,
    table_of,
    tables_of,
)

__all__ = ["Moments", "Settings", "launch_adam", "plan_adam"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one param group: learning rate (a float, or a tensor on the device), betas, eps, weight decay (decoupled, as
    in AdamW, or added to the gradient), and whether the objective is maximised."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Aligned lists over a bucket: parameters, first and second moments, and float32 counts of steps, 0-d."""

    parameters: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor]
    steps: Sequence[Tensor]


def plan_adam(rows: Sequence[Row | None], direction: Write | None, moments: Moments) -> Columns | None:
    """The columns of a fused step, or None where there is no kernel for one of its tensors."""
    writes = [] if direction is None else [direction]
    others = (moments.parameters, moments.first, moments.second)
    return columns_of([row for row in rows if row is not None], writes, others)


def launch_adam(
    columns: Columns,
    rows: Sequence[Row | None],
    gradient: Tensor,
    direction: Write | None,
    moments: Moments,
    settings: Settings,
    scale: Tensor,
    go: Tensor,
) -> Tensor:
    """Write the direction, then step parameters and moments with the guided gradient, which is not written.

    The counts of steps stay as they are.

    Args:
        columns: what :func:`plan_adam` gave for these rows, direction and moments.
        gradient (Tensor): shape [R], coefficients of the guided gradient.
        scale (Tensor): 0-d float64, what the update is multiplied by.
        go (Tensor): 0-d float32; 0 leaves everything as it is.

    Returns:
        Squared lengths of the update by chunk: Tensor [chunks], float32.
    """
    table, lengths, chunks = tables_of(columns)
    squares = torch.empty(len(chunks), dtype=torch.float32, device=columns.device)
    if not len(chunks):
        return squares
    steps = table_of(columns.device, array("q", map(Tensor.data_ptr, moments.steps)))
    beta1, beta2 = settings.betas
    on_device = isinstance(settings.lr, Tensor) and settings.lr.device == columns.device
    turned = gradient if direction is None else direction.coefficients
    p, m, v = columns.others
    wide = len(columns.dtypes) > WIDE
    with on(columns.device):
        adam[(len(chunks),)](
            table, lengths, chunks, steps, gradient.contiguous(), turned.contiguous(), scale, go, squares,
            columns.tensors, settings.lr if on_device else float(settings.lr),
            beta1, 1.0 - beta1, _log2(beta1), beta2, 1.0 - beta2, _log2(beta2), settings.eps, settings.weight_decay,
            DTYPES=columns.dtypes, ROWS=columns.rows, SLOTS=tuple(i for i, row in enumerate(rows) if row),
            D=columns.writes[0][0] if columns.writes else -1, P=p, M=m, V=v, RATE_ON_DEVICE=on_device,
            DECOUPLED=settings.decoupled, MAXIMIZE=settings.maximize,
            RELOAD=wide, BLOCK=WIDEST_BLOCK if wide else WIDE_BLOCK, CHUNK=CHUNK, THREADS=32 * WARPS, num_warps=WARPS,
            maxnreg=REGISTERS, **FUSION,
        )  # fmt: skip
    return squares


def _log2(beta: float) -> float:
    # Powers of 0 are 0, and so are those of 2 to this.
    return math.log2(beta) if beta > 0 else -1e6
