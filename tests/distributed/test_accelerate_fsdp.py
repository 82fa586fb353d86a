"""FSDP by the configuration of Accelerate and Trainer, on two gloo ranks: version 2 equals one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract import kit
from tests.distributed.launch import ranks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.slow

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """Return what one process found without FSDP, then what each of two ranks found."""
    folder: Path = tmp_path_factory.mktemp("fsdp")
    for world in (1, 2):
        ranks("accelerate_fsdp_rank.py", folder, world)
    return [torch.load(folder / name, weights_only=True) for name in ("rank0-1.pt", "rank0-2.pt", "rank1-2.pt")]


@pytest.mark.parametrize("stack", ["accelerate", "trainer"])
def test_i11_fsdp_version_2_equals_one_process_and_resumes(found: list[Found], stack: str) -> None:
    one, *two = (each[stack] for each in found)
    assert [run["kind"] for run in two] == ["FSDP"] * 2
    assert one["kind"] != "FSDP"
    kit.assert_same(two[0]["parameters"], two[1]["parameters"])
    for run in two:
        torch.testing.assert_close(run["parameters"], one["parameters"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run["resumed"], run["parameters"], rtol=0, atol=0)
        assert run["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-5, nan_ok=True)
        assert run["metrics"]["steps"] == 4
    if stack == "trainer":
        assert two[0]["logged"] == pytest.approx(one["logged"], rel=1e-3, abs=1e-6)
        assert two[0]["logged"][-1] > 0


def test_i11_fsdp_version_1_is_refused_with_the_line_that_mends_it(found: list[Found]) -> None:
    for run in found[1:]:
        assert set(run["refusals"]) == {"accelerate", "trainer"}
        assert "fsdp_version: 2 in Accelerate's configuration" in run["refusals"]["accelerate"]
        assert "fsdp_config={'version': 2} in TrainingArguments" in run["refusals"]["trainer"]
