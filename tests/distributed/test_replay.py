"""Compare live sources on two gloo ranks, each with its own batches, with one process that uses all batches."""

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
    return answers("replay_rank.py", tmp_path_factory.mktemp("replay"))


@pytest.mark.parametrize(("kind", "every"), problem.REPLAYS)
def test_ranks_with_batches_of_their_own_equal_one_process(found: list[dict[str, Any]], kind: str, every: int) -> None:
    model = problem.net()
    problem.train(model, problem.guide_by_replay(model, model, every, 0, 1))
    for rank in found:
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                rank[f"{kind}, {every}"]["parameters"][name], p.detach(), rtol=2e-4, atol=2e-5, msg=name
            )


@pytest.mark.parametrize(("kind", "every"), problem.REPLAYS)
def test_ranks_stay_bitwise_together(found: list[dict[str, Any]], kind: str, every: int) -> None:
    first, second = (rank[f"{kind}, {every}"] for rank in found)
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name
    assert first["conflicts"] == second["conflicts"]


def test_sources_are_of_the_ranks_in_the_process_group_of_the_model(found: list[dict[str, Any]]) -> None:
    wanted = [{"replayed": 1.0, "captured": 6, "structured": 6}, {"replayed": 2.0, "captured": 8, "structured": 8}]
    assert [rank["alone"] for rank in found] == wanted


def test_sources_are_of_the_ranks_in_the_mesh_of_the_model(found: list[dict[str, Any]]) -> None:
    assert [rank["submesh"] for rank in found] == [{"replayed": 1.0, "captured": 6, "structured": 6}, {}]


def test_the_replayed_source_changes_the_result() -> None:
    """Training without the source ends at other parameters, so the comparison above covers guided steps."""
    guided, plain = problem.net(), problem.net()
    problem.train(guided, problem.guide_by_replay(guided, guided, 1, 0, 1))
    problem.train(plain, problem.guide(plain, "no source"))
    assert not torch.allclose(guided.first.weight, plain.first.weight, atol=1e-3)
