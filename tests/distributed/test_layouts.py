"""Compare HSDP on a 2 x 2 mesh and tensor parallelism with one process (row 11)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gradguide.distributed.layouts import Layout, all_reduce_sum, local_parts
from tests.distributed.launch import ranks
from tests.distributed.mesh_rank import net, normed, replay, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.mark.parametrize(("how", "world"), [("tensor-parallel", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow)])
def test_i11_meshes_equal_one_process(tmp_path: Path, how: str, world: int) -> None:
    ranks("mesh_rank.py", tmp_path, world, how)
    wanted = train(net(), slice(0, 8))
    for rank in range(world):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found["metrics"] == pytest.approx(wanted["metrics"], rel=1e-2, abs=2e-4, nan_ok=True)
        for name, value in wanted.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=name)
        # Each batch would count once per rank.
        assert ("capture under tensor parallelism is not supported" in found["capture"]) == (how == "tensor-parallel")


def test_i11_partial_gradients_of_sequence_parallelism_are_summed(tmp_path: Path) -> None:
    ranks("mesh_rank.py", tmp_path, 2, "sequence-parallel")
    wanted = replay(normed())
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found["metrics"] == pytest.approx(wanted["metrics"], rel=1e-2, abs=2e-4, nan_ok=True)
        for name, value in wanted.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=name)


class _Mesh:
    """A mesh of two dimensions whose groups are strings."""

    @staticmethod
    def get_group(dim: int) -> str:
        return ("replicate", "shard")[dim]


def test_only_dimensions_that_hold_different_shards_are_summed_over() -> None:
    from torch.distributed.tensor import Replicate, Shard

    assert Layout(_Mesh(), (Replicate(), Shard(0))).reduce_groups == ("shard",)
    assert Layout(_Mesh(), (Shard(0), Shard(1))).reduce_groups == ("replicate", "shard")
    assert Layout(_Mesh(), (Replicate(), Replicate())).reduce_groups == ()


def test_what_is_whole_everywhere_is_counted_once() -> None:
    assert torch.equal(all_reduce_sum({(): torch.ones(2, 2)}), torch.ones(2, 2))


class _Placed:
    """A stand-in for a DTensor of one process."""

    def __init__(self, *placements: object) -> None:
        self.device_mesh = _Mesh()
        self.placements = placements

    def to_local(self) -> str:
        return "part"


def test_gradients_that_lie_otherwise_than_their_parameters_are_refused() -> None:
    from torch.distributed.tensor import Partial, Shard

    sharded, partial, plain = _Placed(Shard(0)), _Placed(Partial()), torch.zeros(2)
    assert local_parts(plain, plain) == (plain, plain, ())
    assert local_parts(sharded, sharded) == ("part", "part", ("replicate",))  # type: ignore[arg-type,comparison-overlap]
    with pytest.raises(ValueError, match=r"gradient has placements .*, its parameter None"):
        local_parts(plain, sharded)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gradient of w has placements .*dim=1.*, its parameter .*dim=0"):
        other = _Placed(Shard(1))
        other.device_mesh = sharded.device_mesh
        local_parts(sharded, other, "w")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient is a partial sum on each rank"):
        local_parts(partial, partial)  # type: ignore[arg-type]
