"""A tiny random language model."""

from __future__ import annotations

from tests.language.conftest import folder

__all__ = ["folder"]
