"""The benchmarks run, and write what they say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import capture, communication

pytestmark = pytest.mark.slow


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_capture(tmp_path: Path) -> None:
    capture.main(["--quick", "--out", str(tmp_path / "capture.csv")])
    found = {row["provider"]: row for row in rows(tmp_path / "capture.csv")}
    assert float(found["forward and backward alone"]["value"]) == 1.0
    assert {"capture, empirical Fisher", "metrics read"} <= set(found)
    assert all(row["commit"] and row["torch"] for row in found.values())


def test_communication_does_not_grow_with_the_parameters(tmp_path: Path) -> None:
    communication.main(["--out", str(tmp_path / "communication.csv")])
    found = rows(tmp_path / "communication.csv")
    for kind, payload in (("AdamW", "0"), ("no source", "64"), ("one source", "144")):
        sent = {row["payload_bytes"] for row in found if row["optimizer"] == kind}
        assert sent == {payload}, kind
    assert {row["ranks"] for row in found} == {"2", "8", "64", "1024"}
