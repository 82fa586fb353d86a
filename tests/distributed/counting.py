"""Count the collectives of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["all_reduce", "counted"]

all_reduce = dist.all_reduce
"""The original function, for calls that are not counted."""


@contextmanager
def counted(calls: list[int]) -> Iterator[None]:
    """Append the number of elements of each ``dist.all_reduce`` inside to ``calls``."""
    module: Any = dist

    def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    module.all_reduce = counting
    try:
        yield
    finally:
        module.all_reduce = all_reduce
