"""Magnitude control: clip gradients and bound updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguide.rules.span import Span
from gradguide.utils.checks import check_range
from gradguide.utils.constants import LEAST_LENGTH

__all__ = ["Magnitude", "clip", "fit", "shrink"]

FITTING = 1.0 - 1e-6
"""Largest allowed result, relative to the largest number of its dtype. The rest is a margin for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude:
    """Clip the guided gradient, and bound the update of the base optimizer.

    Clipping bounds the gradient, and with it the step of SGD. The step of Adam and related optimizers does not depend
    on the gradient's length: each element moves by about the learning rate, clipped or not. So the update itself
    is bounded too, by ``max_update`` times the length of the parameters. This limits the harm of a learning rate that
    is too high. A suitable learning rate never reaches the bound.

    Source: "gradient magnitude control", abstract of arXiv 2506.00726. The bound of the update is the clipped trust
    ratio of LARS and LAMB (arXiv 1708.03888; arXiv 1904.00962, section 3), used as an upper bound only.

    Args:
        max_norm (float): largest norm of the guided gradient per scope, above 0. ``math.inf`` turns clipping off.
        max_update (float | None): largest length of an update, per scope, relative to that of the scope's parameters,
            above 0. Parameters with a root mean square below 0.01 count as 0.01. None turns the bound off. The bound
            needs a copy of the parameters during the step, unless the update is provably within it: see
            :mod:`gradguide.step.adam_bound`. A scope whose update cannot be measured (Inf or NaN, for instance
            after float16 overflow) returns to its parameters before the step. Five such steps in a row give a
            UserWarning at the next, except with a fused base on CUDA. With a schedule-free base, its second sequence z
            is bounded and copied too.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    max_norm: float = 1.0
    max_update: float | None = 0.05

    def __post_init__(self) -> None:
        if self.max_norm is None:
            raise TypeError("max_norm must be a number, found None: math.inf turns clipping off")
        check_range("max_norm", self.max_norm, 0, math.inf, open_low=True)
        if self.max_update is not None:
            check_range("max_update", self.max_update, 0, math.inf, open_low=True, open_high=True)


def clip(norm: Tensor, bound: Tensor | float) -> Tensor:
    """Return the factor in (0, 1] that scales ``norm`` [S] to at most ``bound``, one number or [S]: Tensor [S]."""
    return torch.where(norm > bound, bound / torch.where(norm > bound, norm, 1.0), 1.0)


def fit(span: Span, vector: Tensor, received: int) -> Tensor:
    """Return the factor in (0, 1] that keeps every element of a vector within the range of the gradients' dtype.

    The elements of row ``received`` are within that range. Those of the other rows are at most their lengths.

    Args:
        span: the rows.
        vector (Tensor): coordinates [S, R].
        received (int): index of the gradient as received.

    Returns:
        Tensor [S].
    """
    largest = FITTING * span.largest
    elements = span.lengths.clone()
    elements[:, received] = elements[:, received].clamp(max=largest)
    return clip((vector.abs() * elements).sum(dim=1), largest)


def shrink(update: Tensor, length: Tensor, numbers: Tensor, largest: float) -> Tensor:
    """Return the factor in (0, 1] that scales an update to at most ``largest`` times the length of the parameters.

    Args:
        update, length (Tensor): shape [S], lengths of the update and of the parameters before it.
        numbers (Tensor): shape [S], number of elements of each scope.
        largest (float): see ``Magnitude.max_update``.

    Returns:
        Tensor [S].
    """
    return clip(update, largest * torch.maximum(length, LEAST_LENGTH * numbers.sqrt()))
