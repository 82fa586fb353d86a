"""Detect DeepSpeed ZeRO, whose flat parameter pieces cannot be guided."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["check_zero"]

_MARKS = ("ds_id", "_hp_mapping")  # attributes that ZeRO sets on a model's parameters: stage 3, and stages 1 and 2


def check_zero(groups: Iterable[dict[str, Any]]) -> None:
    """Raise if DeepSpeed ZeRO partitions the parameters of these param groups over ranks.

    ZeRO replaces the parameters of a group by one flat tensor and partitions it over ranks. Each rank would guide its
    piece by the Gram matrix of that piece, without names and scopes.

    Args:
        groups: the param groups of the base optimizer.

    Raises:
        RuntimeError: ZeRO stage 1, 2 or 3 holds the parameters.
    """
    if "deepspeed" not in sys.modules:  # fast path: this runs in each step of a sharded model
        return
    held = [list(group["params"]) for group in groups]
    marked = any(hasattr(p, mark) for parameters in held for p in parameters for mark in _MARKS)
    if marked or (_deepspeed_runs() and all(map(_is_flat, held))):
        raise RuntimeError(
            "DeepSpeed ZeRO divides parameters and gradients into flat pieces, and each rank would measure and "
            "guide only its own; nothing was changed. Use DDP, FSDP2 (torch's fully_shard, or fsdp_version 2 in "
            "Accelerate and Trainer), or DeepSpeed with ZeRO stage 0"
        )


def _is_flat(parameters: list[Tensor]) -> bool:
    """Return whether a group is empty, or holds one flat tensor that is not an nn.Parameter, as ZeRO leaves it."""
    return not parameters or (len(parameters) == 1 and type(parameters[0]) is Tensor and parameters[0].dim() == 1)


def _deepspeed_runs() -> bool:
    """Return whether DeepSpeed initialised its communication in this process."""
    return getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None) is not None
