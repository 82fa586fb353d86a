"""Patch Triton's interpreter, which runs kernels on the CPU: for numpy 2.4, and for speed.

numpy no longer converts arrays of one element to numbers, but the interpreter stores every scalar in such an array.

The interpreter replaces the functions of ``triton.language`` at each launch, and again at each call of a device
function, which takes half of a test's time. The second replacement is left out where it would change nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton import language
from triton.runtime import interpreter

__all__ = ["repair"]


def repair() -> None:
    """Allow scalars of the interpreter as bounds of a ``range``, and replace functions once per launch."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        put = scope[0].set_attr if scope else setattr  # Triton 3.5 has no scopes
        put(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _Replacement(interpreter._patch_lang)


class _Replacement:
    """Call ``replace`` for a launch, and within it for the modules that are not replaced yet."""

    def __init__(self, replace: Any) -> None:
        self._replace = replace
        self._replaced: set[str] = set()
        self._launched = False

    def __call__(self, function: Any) -> Any:
        modules = {
            value.__name__
            for value in function.__globals__.values()
            if inspect.ismodule(value) and value in (language, language.core)
        }
        if self._launched and modules <= self._replaced:
            return None  # the call of a device function does not use it
        scope = self._replace(function)
        self._replaced |= modules
        if self._launched:
            return scope
        self._launched = True
        restore = scope.restore

        def restored() -> None:
            self._launched = False
            self._replaced.clear()
            restore()

        scope.restore = restored
        return scope
