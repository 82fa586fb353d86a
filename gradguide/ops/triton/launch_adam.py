"""Launch the fused step of Adam and AdamW, and the preview that measures its update."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradguide.ops.row import Row, Write
from gradguide.ops.triton.kernels.adam import adam, count
from gradguide.ops.triton.kernels.adam_preview import probe
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
from gradguide.ops.triton.operands import KernelOperands, operands_of

__all__ = ["Groups", "Moments", "Settings", "launch_adam", "launch_count", "launch_preview_update", "plan_adam"]

COUNTS = 1024
"""Step counts that a program updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one param group: learning rate (a float or a device tensor), betas, eps and weight decay."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The param groups of a bucket.

    settings: settings of each group.
    which: int64 [tensors], index of each tensor's group.
    on_device: whether all learning rates are device tensors, which the kernel reads.
    decoupled: whether weight decay is decoupled, as in AdamW, instead of added to the gradient.
    maximize: whether the objective is maximised.
    """

    settings: Sequence[Settings]
    which: array[int]
    on_device: bool
    decoupled: bool
    maximize: bool


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Aligned lists over a bucket: parameters, first and second moments, and 0-d float32 step counts."""

    parameters: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor]
    steps: Sequence[Tensor]

    @cached_property
    def step_addresses(self) -> array[int]:
        """Addresses of the step counts, read once: the moments are those of one step."""
        return array("q", map(Tensor.data_ptr, self.steps))


def plan_adam(rows: Sequence[Row | None], direction: Write | None, moments: Moments) -> KernelOperands | None:
    """Return the operands of a fused step, or None if a tensor has no kernel."""
    writes = [] if direction is None else [direction]
    others = (moments.parameters, moments.first, moments.second)
    return operands_of(rows, writes, others)


def launch_adam(
    operands: KernelOperands,
    rows: Sequence[Row | None],
    gradient: Tensor,
    direction: Write | None,
    moments: Moments,
    groups: Groups,
    scale: Tensor,
    pulls: Tensor | None,
    go: Tensor,
) -> Tensor:
    """Write the direction, then step parameters and moments with the guided gradient, which is not stored.

    The step counts are not changed.

    Args:
        operands: result of :func:`plan_adam` for these rows, direction and moments.
        gradient (Tensor): shape [S, R], coefficients of the guided gradient.
        scale (Tensor): shape [S], float64, factor of the update.
        pulls (Tensor | None): shape [S, R], coefficients of the addition to the update.
        go (Tensor): 0-d float32; 0 changes nothing.

    Returns:
        Squared length of the update of each chunk: Tensor [chunks], float32.
    """
    table, lengths, chunks = tables_of(operands)
    squares = torch.empty(len(chunks), dtype=torch.float32, device=operands.device)
    if not len(chunks):
        return squares
    turned = gradient if direction is None else direction.coefficients
    with on(operands.device):
        adam[(len(chunks),)](
            table, lengths, chunks, _steps(operands, moments), *_settings(operands, groups), gradient.contiguous(),
            turned.contiguous(), (turned if pulls is None else pulls).contiguous(), scale, go, squares,
            operands.tensors, len(rows),
            D=operands.writes[0][0] if operands.writes else -1, PULLED=pulls is not None,
            **_layout(operands, rows, groups),
        )  # fmt: skip
    mark_written(moments.parameters)
    return squares


def launch_count(operands: KernelOperands, moments: Moments, go: Tensor) -> None:
    """Add ``go``, a 0-d float32 tensor, to all step counts, in one launch."""
    with on(operands.device):
        count[(-(-operands.tensors // COUNTS),)](
            _steps(operands, moments), go, operands.tensors, BLOCK=COUNTS, num_warps=WARPS, **FUSION
        )


def launch_preview_update(
    operands: KernelOperands,
    rows: Sequence[Row | None],
    gradient: Tensor,
    moments: Moments,
    groups: Groups,
    first: int,
    sources: int,
) -> Tensor:
    """Return products of the update that :func:`launch_adam` would make, without scale and pulls. Writes nothing.

    Args:
        first, sources: index of the first source among the rows, and the number of sources.

    Returns:
        For each scope the squared norms of the update and of the parameters, then the product of the update with each
        source: Tensor [S, 2 + sources], float64, deterministic.
    """
    table, lengths, chunks = tables_of(operands)
    partials = torch.empty(2 + sources, len(chunks), dtype=torch.float32, device=operands.device)
    if len(chunks):
        with on(operands.device):
            probe[(len(chunks),)](
                partials, table, lengths, chunks, _steps(operands, moments), *_settings(operands, groups),
                gradient.contiguous(), operands.tensors, len(rows), len(chunks), FIRST=first, SOURCES=sources,
                **_layout(operands, rows, groups),
            )  # fmt: skip
    return sums_of(partials, operands)


def _steps(operands: KernelOperands, moments: Moments) -> Tensor:
    """Return the addresses of the step counts, on the device."""
    return table_of(operands.device, moments.step_addresses)


def _settings(operands: KernelOperands, groups: Groups) -> tuple[Tensor, tuple[tuple[float | Tensor, ...], ...]]:
    """Return the group of each tensor, on the device, and the ``settings`` argument of the kernels."""
    return table_of(operands.device, groups.which), tuple(map(_numbers, groups.settings))


def _numbers(settings: Settings) -> tuple[float | Tensor, ...]:
    decays = (number for beta in settings.betas for number in (float(beta), 1.0 - beta, _log2(beta)))
    return (settings.lr, *decays, float(settings.eps), float(settings.weight_decay))


def _layout(operands: KernelOperands, rows: Sequence[Row | None], groups: Groups) -> dict[str, Any]:
    """Return the compile-time arguments and launch options of the kernels."""
    p, m, v = operands.others
    wide = len(operands.dtypes) > WIDE
    return {
        "DTYPES": operands.dtypes, "ROWS": operands.rows, "SLOTS": tuple(i for i, row in enumerate(rows) if row),
        "P": p, "M": m, "V": v, "RATE_ON_DEVICE": groups.on_device, "DECOUPLED": groups.decoupled,
        "MAXIMIZE": groups.maximize, "RELOAD": wide, "BLOCK": WIDEST_BLOCK if wide else WIDE_BLOCK, "CHUNK": CHUNK,
        "THREADS": 32 * WARPS, "num_warps": WARPS, "maxnreg": REGISTERS, **FUSION,
    }  # fmt: skip


def _log2(beta: float) -> float:
    # 2 ** -1e6 underflows to 0, the value of every positive power of beta = 0.
    return math.log2(beta) if beta > 0 else -1e6
