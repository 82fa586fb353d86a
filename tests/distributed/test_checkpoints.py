"""Resume distributed checkpoints of n ranks on m ranks, as if training had not been interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.checkpoint_rank import HALF
from tests.distributed.launch import ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def test_i07_i08_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    ranks("checkpoint_rank.py", tmp_path, 1, "save-one", "load-one")
    ranks("checkpoint_rank.py", tmp_path, 2, "load-one", "save-two", "load-two")
    ranks("checkpoint_rank.py", tmp_path, 1, "load-two")
    for name, saved_on in (("one", 1), ("two", 2)):
        wanted = torch.load(tmp_path / f"{name}-save-{saved_on}.pt", weights_only=True)
        for world in (1, 2):
            found = torch.load(tmp_path / f"{name}-load-{world}.pt", weights_only=True)
            assert found["steps"] == wanted["steps"] == 2 * HALF
            for key, value in wanted.items():
                torch.testing.assert_close(found[key], value, rtol=2e-4, atol=2e-5, msg=f"{key} on {world}")
                if world == saved_on:
                    assert torch.equal(found[key], value), f"{key}: resumed on as many ranks it is the same, bitwise"


def test_i07_sharded_saving_and_loading_before_a_step_need_no_closure_and_draw_no_batch(tmp_path: Path) -> None:
    """A shard may be zero on one rank only, so the ranks agree that a step is on zeros."""
    ranks("checkpoint_rank.py", tmp_path, 2, "allocate")
