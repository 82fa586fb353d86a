"""Work for the tests of the pool, in a module that worker processes can import."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

__all__ = ["broken", "start"]


def start() -> Callable[[Any], Any]:
    """Return work that doubles numbers, and does what its name says to words."""

    def work(what: Any) -> Any:
        if what == "die":
            os._exit(3)
        if what == "raise":
            raise ValueError("no luck")
        if what == "sleep":
            time.sleep(60)
        return 2 * what

    return work


def broken() -> Callable[[Any], Any]:
    """Fail before any work."""
    raise SystemExit(4)
