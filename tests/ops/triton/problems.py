"""Rows of every kind over tensors of irregular shapes, for tests of the kernels."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gradguide.ops import Row
from gradguide.ops.triton import launch

__all__ = ["CHUNK", "DEVICE", "MANY", "ODD", "some_rows", "tensors", "unaligned"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu")

CHUNK = launch.CHUNK if DEVICE.type == "cuda" else 2048
"""Elements per chunk: few in the interpreter, where each operation is slow."""

ODD = [(3, 5), (0,), (), (64, 33), (7, 0, 2), (1,), (1024,), (43, 50)]
"""Scalars, empty tensors, less than a block, one block exactly, and in the interpreter more than one chunk."""

MANY = [(3,), (1,), (2, 2)] * 8


def tensors(seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def unaligned(seed: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the same values as ``tensors``, each offset by one element from a 16-byte boundary."""
    result = []
    for tensor in tensors(seed, shapes, dtype):
        memory = torch.empty(tensor.numel() + 1, dtype=dtype, device=DEVICE)
        result.append(memory[1:].view(tensor.shape).copy_(tensor))
    return result


def some_rows(shapes: list[tuple[int, ...]], sources: int, dtypes: tuple[torch.dtype, ...]) -> list[Row | None]:
    """Return gradient, direction and ``sources`` more rows: moving, plain, anchored and updates, cycling ``dtypes``."""
    seeds = iter(range(1000))

    def draw() -> list[Tensor]:
        seed = next(seeds)
        return tensors(seed, shapes, dtypes[seed % len(dtypes)])

    rows: list[Row | None] = [Row(offset=draw()), Row(offset=draw())]
    now, before = draw(), draw()
    for source in range(sources):
        match source % 4:
            case 0:
                rows.append(Row(offset=draw(), scale=draw(), at=now, anchor=before))
            case 1:
                rows.append(Row(offset=draw()))
            case 2:
                rows.append(Row(scale=draw(), at=now, anchor=before))
            case 3:
                rows.append(Row(at=now, anchor=draw()))
    return rows
