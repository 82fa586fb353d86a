"""Tests that need a CUDA device; ``python -m pytest -m gpu`` runs them, and those of the kernels on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels import HAVE_KERNELS

# They import the kernels, which Triton has to be there for.
if not HAVE_KERNELS:
    collect_ignore_glob = ["test_*.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
