"""The kernels run on the GPU if there is one, else in Triton's interpreter; without Triton these tests are skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.ops.triton.interpreter import repair

    repair()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU they belong to the suite that needs one."""
    from tests.ops.triton.problems import DEVICE

    for item in items:
        if DEVICE.type == "cuda" and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several chunks take not long in the interpreter."""
    from gradguide.ops.triton import adam, launch
    from tests.ops.triton.problems import CHUNK

    monkeypatch.setattr(launch, "CHUNK", CHUNK)
    monkeypatch.setattr(adam, "CHUNK", CHUNK)
