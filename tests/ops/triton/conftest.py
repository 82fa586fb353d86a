"""Run the kernels on the GPU if there is one, else in Triton's interpreter. Without Triton, ignore these tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kernels import HAVE_KERNELS

if not HAVE_KERNELS:
    collect_ignore_glob = ["test_*.py"]

if HAVE_KERNELS and os.environ.get("TRITON_INTERPRET") == "1":
    from tests.ops.triton.interpreter import repair

    repair()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests as GPU tests if they run on a GPU."""
    if not HAVE_KERNELS:
        return
    from tests.ops.triton.problems import DEVICE

    for item in items:
        if DEVICE.type == "cuda" and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use short chunks, so that tests of several chunks are fast in the interpreter."""
    from gradguide.ops.triton import launch, launch_adam
    from tests.ops.triton.problems import CHUNK

    monkeypatch.setattr(launch, "CHUNK", CHUNK)
    monkeypatch.setattr(launch_adam, "CHUNK", CHUNK)
