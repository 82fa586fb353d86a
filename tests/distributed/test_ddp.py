"""Compare DDP on two gloo ranks with one process that uses both halves of every batch (row 18)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import problem
from tests.distributed.launch import answers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return answers("ddp_rank.py", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("kind", problem.KINDS)
def test_i18_two_ddp_ranks_equal_one_process(found: list[dict[str, Any]], kind: str) -> None:
    wanted = problem.alone(kind)
    for rank in found:
        for name, value in wanted["parameters"].items():
            problem.close(rank[kind]["parameters"][name], value, kind, name)
        for step, (ours, theirs) in enumerate(zip(rank[kind]["metrics"], wanted["metrics"], strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-2, abs=2e-4, nan_ok=True), step


@pytest.mark.parametrize("kind", problem.KINDS)
def test_i18_ddp_ranks_stay_bitwise_together_and_guidance_sends_nothing(found: list[dict[str, Any]], kind: str) -> None:
    """DDP averages gradients, so every rank computes the whole Gram matrix. Only the options are compared, once."""
    for name, value in found[0][kind]["parameters"].items():
        assert torch.equal(value, found[1][kind]["parameters"][name]), name
    assert [rank[kind]["all_reduces"] for rank in found] == [[2], [2]]


def test_i18_a_base_that_divides_its_state_among_ranks_is_bitwise_the_same(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for name, value in rank["zero"]["whole"].items():
            assert torch.equal(rank["zero"]["divided"][name], value), name
    whole, divided = (found[0]["zero"][f"{kind} state"] for kind in ("whole", "divided"))
    assert whole.keys() == divided.keys()
    for index, entries in whole.items():
        assert "gradguide.direction" in entries
        assert entries.keys() == divided[index].keys()
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(divided[index][key]), torch.as_tensor(value)), key


def test_i32_guides_of_some_of_the_parameters_each_are_refused_on_every_rank(found: list[dict[str, Any]]) -> None:
    """ZeroRedundancyOptimizer creates an optimizer for its rank's parameters. GradGuide must wrap it from outside."""
    for rank in found:
        assert "the ranks differ in parameters in each group" in rank["inside zero"]
