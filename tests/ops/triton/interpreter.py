"""Patch Triton's interpreter, which runs kernels on the CPU, for numpy 2.4.

numpy no longer converts arrays of one element to numbers, but the interpreter stores every scalar in such an array.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

__all__ = ["repair"]


def repair() -> None:
    """Allow scalars of the interpreter as bounds of a ``range``. Idempotent, and harmless if not needed."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        put = scope[0].set_attr if scope else setattr  # Triton 3.5 has no scopes
        put(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
