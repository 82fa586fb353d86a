"""The backends that can run here: the fused kernels too, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.kernels import HAVE_KERNELS

__all__ = ["BACKENDS", "BACKENDS_AT_LENGTH"]

BACKENDS: list[Any] = ["foreach"]

BACKENDS_AT_LENGTH: list[Any] = ["foreach"]
"""The same, but kernels in the long tests only: the interpreter takes seconds for a step."""

# On a GPU the parameters of these tests would have to lie there.
if HAVE_KERNELS and os.environ.get("TRITON_INTERPRET") == "1":
    from tests.ops.triton.interpreter import repair

    repair()
    BACKENDS.append("triton")
    BACKENDS_AT_LENGTH.append(pytest.param("triton", marks=pytest.mark.slow))
