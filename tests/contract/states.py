"""Changes to state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

State = dict[str, Any]


def set_to(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return change


def without_own(state: State) -> State:
    """Return only the base's state."""
    kept: dict[Any, Any] = {}
    for key, entry in state["state"].items():
        if isinstance(entry, dict):
            rest = {k: v for k, v in entry.items() if not str(k).startswith("gradguide.")}
            if rest or not entry:
                kept[key] = rest
        else:
            kept[key] = entry
    return {**state, "state": kept}
