"""Launching the fused step of Adam and AdamW, and the measuring of its update before it is made."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradguide.ops.row import Row, Write
from gradguide.ops.triton.columns import Columns, columns_of
from gradguide.ops.triton.kernels.adam import adam, count
from gradguide.ops.triton.kernels.probe import probe
from gradguide.ops.triton.launch import (
    CHUNK,
    FUSION,
    REGISTERS,
    WARPS,
    WIDE,
    WIDE_BLOCK,
    WIDEST_BLOCK,
    mark_written,
    on,
    sums_of,
    table_of,
    tables_of,
)

__all__ = ["Groups", "Moments", "Settings", "launch_adam", "launch_count", "launch_probe", "plan_adam"]

COUNTS = 1024
"""Counts of steps that a program adds to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one param group: learning rate (a float, or a tensor on the device), betas, eps and weight decay."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The param groups of a bucket.

    settings: of each group.
    which: int64 [tensors], the group of each tensor.
    on_device: whether all learning rates are tensors there, and are read by the kernel.
    decoupled: whether weight decay is, as in AdamW, or is added to the gradient.
    maximize: whether the objective is maximised.
    """

    settings: Sequence[Settings]
    which: array[int]
    on_device: bool
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
    return columns_of(rows, writes, others)


def launch_adam(
    columns: Columns,
    rows: Sequence[Row | None],
    gradient: Tensor,
    direction: Write | None,
    moments: Moments,
    groups: Groups,
    scale: Tensor,
    pulls: Tensor | None,
    go: Tensor,
) -> Tensor:
    """Write the direction, then step parameters and moments with the guided gradient, which is not written.

    The counts of steps stay as they are.

    Args:
        columns: what :func:`plan_adam` gave for these rows, direction and moments.
        gradient (Tensor): shape [S, R], coefficients of the guided gradient.
        scale (Tensor): shape [S], float64, what the update is multiplied by.
        pulls (Tensor | None): shape [S, R], coefficients of what is added to the update.
        go (Tensor): 0-d float32; 0 leaves everything as it is.

    Returns:
        Squared lengths of the update by chunk: Tensor [chunks], float32.
    """
    table, lengths, chunks = tables_of(columns)
    squares = torch.empty(len(chunks), dtype=torch.float32, device=columns.device)
    if not len(chunks):
        return squares
    turned = gradient if direction is None else direction.coefficients
    with on(columns.device):
        adam[(len(chunks),)](
            table, lengths, chunks, _steps(columns, moments), *_settings(columns, groups), gradient.contiguous(),
            turned.contiguous(), (turned if pulls is None else pulls).contiguous(), scale, go, squares, columns.tensors,
            len(rows),
            D=columns.writes[0][0] if columns.writes else -1, PULLED=pulls is not None,
            **_layout(columns, rows, groups),
        )  # fmt: skip
    mark_written(moments.parameters)
    return squares


def launch_count(columns: Columns, moments: Moments, go: Tensor) -> None:
    """Add ``go``, a 0-d float32 tensor, to the counts of steps: one launch, however many they are."""
    with on(columns.device):
        count[(-(-columns.tensors // COUNTS),)](
            _steps(columns, moments), go, columns.tensors, BLOCK=COUNTS, num_warps=WARPS, **FUSION
        )


def launch_probe(
    columns: Columns,
    rows: Sequence[Row | None],
    gradient: Tensor,
    moments: Moments,
    groups: Groups,
    first: int,
    sources: int,
) -> Tensor:
    """Products of the update that :func:`launch_adam` would make, unscaled and with nothing added. Writes nothing.

    Args:
        first, sources: number of the first source among the rows, and how many there are.

    Returns:
        For each scope the update with itself, the parameters with themselves, the update with each source: Tensor
        [S, 2 + sources], float64, the same bits for the same step.
    """
    table, lengths, chunks = tables_of(columns)
    partials = torch.empty(2 + sources, len(chunks), dtype=torch.float32, device=columns.device)
    if len(chunks):
        with on(columns.device):
            probe[(len(chunks),)](
                partials, table, lengths, chunks, _steps(columns, moments), *_settings(columns, groups),
                gradient.contiguous(), columns.tensors, len(rows), len(chunks), FIRST=first, SOURCES=sources,
                **_layout(columns, rows, groups),
            )  # fmt: skip
    return sums_of(partials, columns)


def _steps(columns: Columns, moments: Moments) -> Tensor:
    """Addresses of the counts of steps, on the device."""
    return table_of(columns.device, array("q", map(Tensor.data_ptr, moments.steps)))


def _settings(columns: Columns, groups: Groups) -> tuple[Tensor, tuple[tuple[float | Tensor, ...], ...]]:
    """The group of each tensor, on the device, and what kernels call the settings of each group."""
    return table_of(columns.device, groups.which), tuple(map(_numbers, groups.settings))


def _numbers(settings: Settings) -> tuple[float | Tensor, ...]:
    decays = (number for beta in settings.betas for number in (float(beta), 1.0 - beta, _log2(beta)))
    return (settings.lr, *decays, float(settings.eps), float(settings.weight_decay))


def _layout(columns: Columns, rows: Sequence[Row | None], groups: Groups) -> dict[str, Any]:
    """What the kernels are specialised on."""
    p, m, v = columns.others
    wide = len(columns.dtypes) > WIDE
    return {
        "DTYPES": columns.dtypes, "ROWS": columns.rows, "SLOTS": tuple(i for i, row in enumerate(rows) if row),
        "P": p, "M": m, "V": v, "RATE_ON_DEVICE": groups.on_device, "DECOUPLED": groups.decoupled,
        "MAXIMIZE": groups.maximize, "RELOAD": wide, "BLOCK": WIDEST_BLOCK if wide else WIDE_BLOCK, "CHUNK": CHUNK,
        "THREADS": 32 * WARPS, "num_warps": WARPS, "maxnreg": REGISTERS, **FUSION,
    }  # fmt: skip


def _log2(beta: float) -> float:
    # Powers of 0 are 0, and so are those of 2 to this.
    return math.log2(beta) if beta > 0 else -1e6
