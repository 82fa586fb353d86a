"""Tensors drawn from seeds, and tensors that lie in memory as others do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DTYPES", "as_array", "drawn", "laid_out", "spacing", "twin", "unit"]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def drawn(seed: tuple[int, ...], shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    """Normal numbers times ``scale``: the same for the same seed and shape."""
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def as_array(tensor: Tensor) -> NDArray[np.float64]:
    """The numbers of a tensor, flat, in float64."""
    array: NDArray[np.float64] = tensor.detach().to(torch.float64).reshape(-1).numpy().copy()
    return array


def twin(tensor: Tensor) -> Tensor:
    """A tensor of the same numbers, strides and offset in memory of its own."""
    copy = torch.empty(0, dtype=tensor.dtype)
    storage = tensor.detach().untyped_storage().clone()
    return copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers and shape, with the memory layout ``layout``."""
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided" and values.dim() >= 1:
        wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout in ("offset", "flat"):
        wide = torch.zeros(values.numel() + 3, dtype=values.dtype)
        wide[1 : 1 + values.numel()] = values.reshape(-1)
        return wide[1 : 1 + values.numel()].view(values.shape)
    return values.clone(memory_format=torch.contiguous_format)


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff."""
    return float(torch.finfo(dtype).eps) / 2


def spacing(values: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    """One unit in the last place of each number."""
    info: Any = torch.finfo(dtype)
    gap: NDArray[np.float64] = info.eps * np.abs(values) + info.smallest_normal * info.eps
    return gap
