"""Counting the collectives that a step makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["all_reduce", "counted"]

all_reduce = dist.all_reduce
"""As it is, for what is not to be counted."""


@contextmanager
def counted(calls: list[int]) -> Iterator[None]:
    """Within, each ``dist.all_reduce`` adds its number of elements to ``calls``."""
    module: Any = dist

    def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    module.all_reduce = counting
    try:
        yield
    finally:
        module.all_reduce = all_reduce
