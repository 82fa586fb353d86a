"""Record the operations of torch that would be launched on a device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operations"]

# Operations that only create, view or inspect tensors.
_FREE = {
    "_record_function_enter_new", "_record_function_exit", "empty", "empty_like", "view", "_unsafe_view", "select",
    "slice", "unsqueeze", "squeeze", "unbind", "alias", "detach", "as_strided", "t", "transpose", "permute", "expand",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Record the names of the operations in this context that would be launched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
