"""Check whether the fused kernels can run."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module

import torch

__all__ = ["lacks_triton"]

OLDEST = (3, 5)
"""Minimum version of Triton: earlier ones do not compile kernels with tuple arguments."""

CAPABILITY = (8, 0)
"""Minimum compute capability, Ampere: the oldest that Triton supports, and the first with bfloat16."""


@cache
def lacks_triton(device: torch.device) -> str | None:
    """Return the missing requirement for Triton kernels on ``device``, or None if they can run.

    With Triton's interpreter (``TRITON_INTERPRET=1``, for tests) kernels run on the CPU.
    """
    try:
        version: str = import_module("triton").__version__
    except ImportError:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or newer, found {version}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"it runs on CUDA devices, found parameters on {str(device)!r}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < CAPABILITY:
        return f"it needs compute capability 8.0 or newer, found {capability[0]}.{capability[1]}"
    return None
