"""Run Trainer with ``guide`` on two gloo ranks under DDP: it equals one process and resumes bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract import kit
from tests.distributed.launch import ranks

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what one process found, then what each of two ranks found."""
    folder: Path = tmp_path_factory.mktemp("trainer")
    for world in (1, 2):
        ranks("trainer_rank.py", folder, world)
    return [torch.load(folder / name, weights_only=True) for name in ("rank0-1.pt", "rank0-2.pt", "rank1-2.pt")]


def test_i18_two_ddp_ranks_of_a_guided_trainer_equal_one_process(found: list[dict[str, Any]]) -> None:
    one, *two = found
    assert [run["wrapped"] for run in two] == ["DistributedDataParallel"] * 2
    kit.assert_same(two[0]["parameters"], two[1]["parameters"])
    for run in two:
        torch.testing.assert_close(run["parameters"], one["parameters"], rtol=1e-4, atol=1e-5)
        assert run["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5, nan_ok=True)
        assert run["metrics"]["steps"] == 4
        assert run["metrics"]["source_drift"] > 0
    assert two[0]["logged"] == pytest.approx(one["logged"], rel=1e-3, abs=1e-6)


def test_i03_a_guided_trainer_resumes_bitwise_on_every_rank(found: list[dict[str, Any]]) -> None:
    for run in found:
        kit.assert_same(run["resumed"], run["parameters"])
