"""Rows of 8-bit codes for tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradguide.ops import Row
from gradguide.ops.codes import encode

__all__ = ["coded"]


def coded(values: Sequence[Tensor], *, fixed: bool = False) -> Row:
    """The row of these values, in 8 bits."""
    pairs = [encode(value) for value in values]
    return Row(offset=[codes for codes, _ in pairs], steps=[steps for _, steps in pairs], fixed=fixed)
