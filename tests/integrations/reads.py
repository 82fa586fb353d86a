"""Count how often metrics are read."""

from __future__ import annotations

import pytest

from gradguide import GradGuide

__all__ = ["count_reads"]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one entry with each call of ``GradGuide.metrics``."""
    read: list[int] = []
    before = GradGuide.metrics

    def counted(self: GradGuide) -> dict[str, float]:
        read.append(1)
        return before(self)

    monkeypatch.setattr(GradGuide, "metrics", counted)
    return read
