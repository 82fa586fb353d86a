"""Triton's interpreter, which runs kernels on the CPU, made to work with numpy 2.4.

numpy no longer turns arrays of one element into numbers, and the interpreter holds every scalar in such an array.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

__all__ = ["repair"]


def repair() -> None:
    """Let scalars of the interpreter be bounds of a ``range``. Harmless if called again, or not needed."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        put = scope[0].set_attr if scope else setattr  # Triton 3.5 has no scopes
        put(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
