"""Check the value that a loss function returns."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

__all__ = ["Loss", "check_loss"]

Loss: TypeAlias = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, int]"]
"""``loss(model, batch)`` returns a mean, or a mean and the number of terms in it."""


def check_loss(value: object, index: int) -> tuple[Tensor, int | None]:
    """Return the loss of batch number ``index`` as Tensor [], and the number of terms in its mean if it is given.

    Raises:
        ValueError: the loss is not a scalar or has no gradient. The number is not a whole number of at least 1.
    """
    loss, *counts = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must return a scalar tensor, or one and a count, found {found} on batch {index}")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of batch {index} has no gradient: it was detached, computed under no_grad, or computed in a "
            "reentrant checkpoint whose inputs require no gradient (pass use_reentrant=False)"
        )
    return loss.reshape(()), _count(counts[0], index) if counts else None


def _count(value: object, index: int) -> int:
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"loss must return a count, a whole number of at least 1, found {value!r} on batch {index}")
    return count
