"""Count the examples of a batch."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Examples"]


class Examples:
    """Count examples with a function if one is given, else by the first dimension of the first tensor.

    Args:
        count: ``count(batch)`` returns an integer of at least 1.
    """

    def __init__(self, count: Callable[[Any], int] | None = None) -> None:
        if count is not None and not callable(count):
            raise TypeError(f"examples must be a function of a batch, found {count!r}")
        self._count = count
        self._warned = False

    def of(self, batch: Any, index: int) -> int:
        """Return the number of examples in batch number ``index``.

        Raises:
            TypeError: the examples cannot be counted, or the function does not return an integer.
            ValueError: the function returns less than 1.

        Warns:
            UserWarning: once, if no function is given and the tensors of a batch differ in their first dimension.
        """
        if self._count is None:
            return self._by_shape(batch, index)
        given = self._count(batch)
        try:
            found = operator.index(given)
        except TypeError as error:
            raise TypeError(f"examples must return a whole number, found {given!r} for batch {index}") from error
        if found < 1:
            raise ValueError(f"examples must return at least 1, found {found} for batch {index}")
        return found

    def _by_shape(self, batch: Any, index: int) -> int:
        shapes = [tuple(t.shape) for t in _tensors(batch) if t.dim() > 0]
        if not shapes:
            raise TypeError(
                f"a batch must hold a tensor whose first dimension counts examples, found {type(batch).__name__} "
                "without; pass examples=lambda batch: ..."
            )
        count = shapes[0][0]
        if not self._warned and any(shape[0] != count for shape in shapes):
            self._warned = True
            warnings.warn(
                f"batch {index} is counted as {count} examples by its first tensor, but its tensors differ in their "
                f"first dimension: shapes {', '.join(map(str, shapes))}. If that is not the number of examples "
                "(packed sequences, graphs), pass examples=lambda batch: ...",
                UserWarning,
                stacklevel=7,
            )
        return count


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [item for item in batch.values() if isinstance(item, Tensor)]
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return [item for item in batch if isinstance(item, Tensor)]
    raise TypeError(
        f"a batch must be a tensor, or a mapping or sequence of tensors, found {type(batch).__name__}; for other types "
        "pass examples=lambda batch: ..."
    )
