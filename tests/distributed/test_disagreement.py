"""Ranks that disagree: an error on every rank, no hang, nothing changed (rows 16, 17)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.launch import ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.mark.parametrize("what", ["sources", "order", "scopes", "rules", "nothing"])
def test_i16_ranks_that_disagree_are_told_so_on_every_rank(tmp_path: Path, what: str) -> None:
    outputs = ranks("disagree_rank.py", tmp_path, 2, what, timeout=90.0)
    for output in outputs:
        if what == "nothing":
            assert output.strip() == "stepped"
        else:
            assert "refused, parameters unchanged: the ranks differ in what they train" in output
