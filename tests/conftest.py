from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Set before Triton is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("default", deadline=None, max_examples=100)
settings.register_profile("quick", deadline=None, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seeded_on_one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch and use one thread: the suite runs in one process per core. Long tests run alone."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Reset Accelerate's state, which is in singletons."""
    accelerate = pytest.importorskip("accelerate.state")
    yield
    accelerate.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.GradientState._reset_state()


def pytest_collection_finish() -> None:
    """Exempt what the imports left from garbage collection: a pass over a million objects takes most of a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """End the exemption: libraries report what is not collected when the interpreter ends."""
    gc.unfreeze()
