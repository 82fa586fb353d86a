"""Check options that differ between ranks: every rank raises with the option, without deadlock or change (row 32)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gradguide.distributed.agreement import describe
from tests.distributed.disagree_rank import AGREEING, CASES, DDP_CASES, ODD, USUAL
from tests.distributed.launch import ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

# The label in the message, if it is not the name of the case.
NAMED = {
    "number of sources": "alignment.source",
    "order of sources": "alignment.source",
    "names of sources": "alignment.source",
    "kind of source": "alignment.source",
    "when a source is refreshed": "alignment.source",
    "scope mapping": "parameter",
    "order of parameters": "parameter 0",
    "number of parameters": "parameters in each group",
    "groups": "parameters in each group",
    "frozen": "frozen",
    "names": "last.biasx",
    "maximize": "group 0 maximize",
    "set_alignment": "alignment.weight",
    "add_param_group": "group 1 weight_decay",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str | None]]]:
    """Return the error of each rank, under FSDP2 and under DDP."""
    return {how: messages(tmp_path_factory.mktemp(how), how) for how in ("fsdp", "ddp")}


def messages(folder: Path, how: str) -> list[dict[str, str | None]]:
    ranks("disagree_rank.py", folder, 2, how)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("how", "case"), [*(("fsdp", c) for c in CASES), *(("ddp", c) for c in DDP_CASES)])
def test_i32_an_option_that_differs_is_refused_by_name_on_every_rank(
    found: dict[str, list[dict[str, str | None]]], how: str, case: str
) -> None:
    errors = [rank[case] for rank in found[how]]
    for message in errors:
        assert message is not None, "not refused"
        assert message.startswith("the ranks differ in ")
        assert NAMED.get(case, case) in message
        assert "on rank 0" in message
        assert "on rank 1" in message
    assert errors[0] == errors[1]


@pytest.mark.parametrize("how", ["fsdp", "ddp"])
@pytest.mark.parametrize("case", AGREEING)
def test_i32_ranks_that_agree_step(found: dict[str, list[dict[str, str | None]]], how: str, case: str) -> None:
    assert [rank[case] for rank in found[how]] == [None, None]


def test_i32_every_option_of_every_rule_is_tried() -> None:
    for name, (kind, _) in USUAL.items():
        assert {field.name for field in fields(kind) if field.init} == set(ODD[name])


def test_i32_different_values_have_different_text() -> None:
    """Equal values have equal text, and different values of any type have different text."""
    values = [None, True, 1, 1.5, "1", (1, 2), [1, [2]], {"a": 1}, {"b": 1}, torch.tensor(2.0)]
    texts = [tuple(describe("x", value).items()) for value in values]
    assert len(set(texts)) == len(values)
    assert describe("x", object()) == describe("x", object()), "an address is not compared"
