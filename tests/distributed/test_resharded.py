"""Use names and scopes from before ``fully_shard`` for the DTensors that replace the parameters (rows 8, 35)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from tests.distributed import problem
from tests.distributed.launch import answers
from tests.distributed.names_rank import FORMS, STEPS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return answers("names_rank.py", tmp_path_factory.mktemp("names"))


@pytest.mark.parametrize("form", FORMS)
def test_i35_names_taken_before_fully_shard_guide_as_those_taken_after_it(
    found: list[dict[str, Any]], form: str
) -> None:
    for rank in found:
        for name, value in rank["sourced, None"].items():
            assert torch.equal(rank[f"sourced, {form}"][name], value), name


@pytest.mark.filterwarnings("ignore:no batch reached")
def test_i35_a_source_captured_before_fully_shard_guides_as_in_one_process(found: list[dict[str, Any]]) -> None:
    model = problem.net()
    batches = [problem.batch(step) for step in range(3)]
    source = SourceGradient.capture(model, batches, lambda m, b: problem.loss_of(m, *b), curvature=False)
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    optimizer = GradGuide(
        base, alignment=Alignment(source, weight=0.5), names=model.named_parameters(), direction=Direction()
    )
    problem.train(model, optimizer, range(STEPS))
    for rank in found:
        for name, p in model.named_parameters():
            torch.testing.assert_close(rank["sourced, pairs"][name], p.detach(), rtol=2e-4, atol=2e-5, msg=name)


def test_i35_parameters_with_equal_values_are_matched_by_their_order(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert set(rank["names"].values()) == {"all"}, rank["names"]


def test_i35_a_group_added_after_fully_shard_has_the_names_given_before_it(found: list[dict[str, Any]]) -> None:
    assert [rank["added"] for rank in found] == [True, True]


def test_i35_what_is_not_certain_is_refused_with_the_way_out(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for case, message in rank["refused"].items():
            assert "from before fully_shard" in message, case
            assert "names=model" in message, case


@pytest.mark.parametrize("how", ["early", "and swapped"])
def test_i08_a_mapping_of_scopes_follows_its_parameters(found: list[dict[str, Any]], how: str) -> None:
    for rank in found:
        assert rank[f"scoped {how}"]["labels"] == 2
        for name, value in rank["scoped late"].items():
            assert torch.equal(rank[f"scoped {how}"][name], value), name
