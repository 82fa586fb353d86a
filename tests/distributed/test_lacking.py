"""Check gradients that are missing or not finite on one rank: no deadlock, equal decisions (rows 17, 19)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.lacking_rank import KINDS, NOT_FINITE
from tests.distributed.launch import answers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return answers("lacking_rank.py", tmp_path_factory.mktemp("lacking"))


@pytest.mark.parametrize("kind", KINDS)
def test_i17_the_collectives_of_a_step_are_the_same_whatever_gradients_are_missing(
    found: list[dict[str, Any]], kind: str
) -> None:
    first, second = (rank[f"lacking, {kind}"] for rank in found)
    assert first["calls"] == second["calls"]
    full, one_lacks, all_lack = first["calls"]
    assert full == [2, *one_lacks], "only the first step compares options"
    assert one_lacks == all_lack
    for name, value in first["parameters"].items():
        # The replicated parameter differs, as with the base alone: only one rank had its gradient.
        assert name == "gain" or torch.equal(value, second["parameters"][name]), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_i15_a_rank_without_gradients_warns_once(found: list[dict[str, Any]], kind: str) -> None:
    counts = [[len(messages) for messages in rank[f"lacking, {kind}"]["warnings"]] for rank in found]
    assert counts == [[0, 0, 1], [0, 1, 0]]
    assert "no parameter has a gradient" in found[0][f"lacking, {kind}"]["warnings"][2][0]


@pytest.mark.parametrize("how", NOT_FINITE)
def test_i19_what_is_not_finite_on_one_rank_is_left_out_on_all(found: list[dict[str, Any]], how: str) -> None:
    for rank in found:
        ours = rank[f"{how}, skip"]
        assert ours == {"error": None, "unchanged": True, "steps": 2.0, "skipped": 1.0}


@pytest.mark.parametrize("how", NOT_FINITE)
def test_i19_what_is_not_finite_on_one_rank_raises_on_all(found: list[dict[str, Any]], how: str) -> None:
    for number, rank in enumerate(found):
        ours = rank[f"{how}, raise"]
        assert ours["unchanged"]
        assert (ours["steps"], ours["skipped"]) == (2.0, 0.0)
        assert "NaN or Inf; nothing was changed" in ours["error"]
        if how == "fsdp, whole parameter":
            assert ("gain" if number == 1 else "another rank") in ours["error"]
