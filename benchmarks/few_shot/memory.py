"""Peak memory of one run."""

from __future__ import annotations

import math
from pathlib import Path

import torch

__all__ = ["peak_memory", "reset_peak"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Starts anew: what is held now counts as the peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _RESET.exists():
        _RESET.write_text("5")  # man 5 proc: resets the peak of the resident set


def peak_memory() -> float:
    """Bytes: on CUDA those of tensors, else the process's resident set (on Linux; nan where it cannot be read)."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    if not _STATUS.exists():
        return math.nan
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return 1024.0 * int(line.split()[1])
