"""Run the real DeepSpeed on two gloo ranks: ZeRO raises, stage 0 equals one process (row 15)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.distributed import problem
from tests.distributed.launch import answers

pytestmark = [
    pytest.mark.slow,
    # Not imported at the top, because that would delay the collection of all tests.
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return answers("deepspeed_rank.py", tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_i15_zero_is_refused_by_name_on_every_rank_and_changes_nothing(found: list[dict[Any, Any]], stage: int) -> None:
    runs = [run for rank in found for case, run in rank.items() if case[0] == stage]
    assert len(runs) == (2 if stage == 2 else 4)
    for run in runs:
        for message in (run["at step"], run["late"]):
            assert "DeepSpeed ZeRO" in message
            assert all(way in message for way in ("DDP", "FSDP2", "stage 0"))
        assert run["metrics"]["steps"] == run["metrics"]["skipped"] == 0
        for name, value in run["before"].items():
            assert torch.equal(run["after"][name], value), name


def test_i15_zero_stage_0_equals_one_process(found: list[dict[Any, Any]]) -> None:
    wanted = problem.net()
    optimizer = problem.guide_for_deepspeed(wanted)
    problem.train(wanted, optimizer, range(3))
    for rank in found:
        run = rank[0, "float32"]
        assert run["at step"] is None
        assert run["metrics"] == pytest.approx(optimizer.metrics(), rel=1e-4, abs=1e-6, nan_ok=True)
        for name, p in wanted.named_parameters():
            torch.testing.assert_close(run["after"][name], p.detach(), rtol=2e-4, atol=2e-5, msg=name)
