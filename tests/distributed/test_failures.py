"""A capture that fails on one rank raises on all ranks, instead of a wait in the sums over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gradguide import SourceGradient
from gradguide.sources.structured import StructuredSource
from tests.distributed.failures_rank import Net, batches, capture, square
from tests.distributed.launch import answers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

MEMORY = "RuntimeError: no more memory"
REASONS = {
    "structured: loss raises": MEMORY,
    "structured: last batch raises": MEMORY,
    "structured: no batch and an error": MEMORY,
    "structured: no prediction": "ValueError: batch 0 has a loss of 0.0 over 0 predictions",
    "structured: changed input": "ValueError: the input of first was changed in place",
    "gradient: loss raises": MEMORY,
    "gradient: last batch raises": MEMORY,
    "gradient: no batch and an error": MEMORY,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def errors(folder: Path) -> list[dict[str, str]]:
    """Return the error of each rank by case."""
    return answers("failures_rank.py", folder)


@pytest.mark.parametrize("case", REASONS)
def test_the_failed_rank_raises_its_own_error_and_the_other_one_refers_to_it(
    errors: list[dict[str, str]], case: str
) -> None:
    assert errors[1][case].startswith(REASONS[case])
    assert errors[0][case] == (
        "RuntimeError: capture failed on 1 of 2 ranks, not on rank 0: see the error of the other rank. Nothing was "
        "captured"
    )


@pytest.mark.parametrize("case", ["structured: both raise", "gradient: both raise", "structured: sharded"])
def test_each_failed_rank_raises_its_own_error(errors: list[dict[str, str]], case: str) -> None:
    assert [rank[case] for rank in errors] == [f"KeyError: 'reason of rank {rank}'" for rank in range(2)]


@pytest.mark.usefixtures("errors")
def test_the_next_capture_equals_that_of_one_process(folder: Path) -> None:
    wanted = capture(Net(), [*batches(2), *batches(2)], square, "structured")
    first, second = (StructuredSource.load(folder / f"structured{rank}.safetensors") for rank in range(2))
    assert first.fingerprint() == second.fingerprint()
    for name in wanted.names():
        for ours, theirs in zip(first.factors(name), wanted.factors(name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    gradients = [SourceGradient.load(folder / f"gradient{rank}.safetensors") for rank in range(2)]
    assert gradients[0].fingerprint() == gradients[1].fingerprint()
