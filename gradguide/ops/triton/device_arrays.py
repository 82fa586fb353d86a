"""Integer arrays for the kernels, cached on the device, and copied without host synchronization."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DeviceArrayCache", "bounds_of", "chunk_numbers"]

Key = tuple[torch.device, str, bytes]


@dataclass(slots=True)
class _Entry:
    """An array on the device, its pinned source memory, and whether a CUDA graph reads either."""

    table: Tensor
    staged: Tensor | None
    captured: bool = False


class DeviceArrayCache:
    """A cache of device arrays, keyed by content, so entries never become stale. It evicts the least recently used.

    Args:
        budget: maximum bytes, on the device and in pinned memory each. Entries that CUDA graphs read are never evicted.
    """

    def __init__(self, budget: int = 64 << 20) -> None:
        self._budget = budget
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, device: torch.device, kind: str, key: bytes, make: Callable[[], Tensor]) -> Tensor:
        """Return the result of ``make`` for ``key``: Tensor int64 on ``device``.

        Raises:
            RuntimeError: a CUDA graph is being captured, and no earlier step allocated pinned memory of this size.
        """
        found = self._entries.get((device, kind, key))
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if found is None:
            found = _Entry(*self._copied(make(), device, capturing))
            self._entries[device, kind, key] = found
            self._bytes += found.table.nbytes
        self._entries.move_to_end((device, kind, key))
        # Each replay of a graph reads the array again, and repeats the copy if that was captured.
        found.captured = found.captured or capturing
        self._evict(found)
        return found.table

    def _copied(self, numbers: Tensor, device: torch.device, capturing: bool) -> tuple[Tensor, Tensor | None]:
        if device.type != "cuda":
            return numbers.to(device, copy=True), None
        staged = self._borrowed(numbers) if capturing else torch.empty_like(numbers, pin_memory=True)
        staged.copy_(numbers)
        return staged.to(device, non_blocking=True), staged

    def _borrowed(self, numbers: Tensor) -> Tensor:
        """Return pinned memory of an earlier array of this size, already copied: a capture cannot allocate any."""
        for entry in self._entries.values():
            if entry.staged is not None and not entry.captured and entry.staged.shape == numbers.shape:
                staged, entry.staged = entry.staged, None
                return staged
        raise RuntimeError(
            "a CUDA graph is being captured before GradGuide has made a step over these tensors; make at least one "
            "ordinary step first, as a warm-up"
        )

    def _evict(self, current: _Entry) -> None:
        if self._bytes <= self._budget:
            return  # the usual case, without building a list of the keys
        for key in list(self._entries):
            if self._bytes <= self._budget:
                return
            entry = self._entries[key]
            if entry is not current and not entry.captured:
                del self._entries[key]
                self._bytes -= entry.table.nbytes


def chunk_numbers(lengths: array[int], sizes: array[int], size: int) -> Tensor:
    """Return tensor, index within it and scope of each chunk of ``size`` elements, in order: Tensor [chunks, 3].

    Empty tensors have no chunks.
    """
    counts = _counts(lengths, size)
    tensors = torch.arange(len(lengths)).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    scopes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.stack([tensors, torch.arange(len(tensors)) - first[tensors], scopes[tensors]], dim=1)


def bounds_of(lengths: array[int], sizes: array[int], size: int) -> Tensor:
    """Return the index of the first chunk of each scope, then the number of chunks: Tensor [scopes + 1]."""
    before = torch.cat([torch.zeros(1, dtype=torch.int64), _counts(lengths, size).cumsum(0)])
    ends = torch.tensor(sizes).cumsum(0)
    return torch.cat([before[:1], before[ends]])


def _counts(lengths: array[int], size: int) -> Tensor:
    """Return the number of chunks of each tensor: Tensor [tensors]."""
    return (torch.tensor(lengths, dtype=torch.int64) + size - 1) // size
