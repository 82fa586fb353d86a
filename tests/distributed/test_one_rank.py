"""Copy, save and step DTensors on one rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

from gradguide import Direction, GradGuide
from tests.contract import kit

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

Place = Callable[[Tensor], Tensor]


@pytest.fixture
def placed(tmp_path: Path) -> Iterator[Place]:
    """A function that makes a DTensor of a tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: DTensor.from_local(tensor, mesh, [Shard(0)])
    dist.destroy_process_group()


@pytest.mark.parametrize("copied", [copy.deepcopy, kit.through_file])
def test_a_state_dict_of_dtensors_can_be_copied_and_saved(placed: Place, copied: Callable[[Any], Any]) -> None:
    parameters = [nn.Parameter(placed(torch.ones(3, 2))) for _ in range(3)]
    optimizer = GradGuide(SGD(parameters, lr=0.1), direction=Direction())
    for number, p in enumerate(parameters):
        p.grad = placed(torch.full((3, 2), 1.0 + number))
    optimizer.step()
    state = optimizer.state_dict()
    found = copied(state)
    for number, entry in state["state"].items():
        direction = found["state"][number]["gradguide.direction"]
        assert bool(direction.to_local().any())
        assert torch.equal(direction.to_local(), entry["gradguide.direction"].to_local())
    optimizer.load_state_dict(found)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.complex(torch.ones(3, 2), torch.full((3, 2), 2.0)).conj().imag,
        lambda: torch.tensor([[-2.0]]).expand(3, 2),
    ],
    ids=["negated", "expanded"],
)
def test_a_dtensor_gradient_without_memory_of_its_own_is_copied(placed: Place, make: Callable[[], Tensor]) -> None:
    parameters = [nn.Parameter(placed(torch.ones(3, 2))) for _ in range(2)]
    for p, gradient in zip(parameters, (make(), make().resolve_neg().contiguous()), strict=True):
        p.grad = placed(gradient)
        GradGuide(SGD([p], lr=0.1), direction=Direction()).step()
    first, second = (p.to_local() for p in parameters)  # type: ignore[attr-defined]
    assert torch.equal(first, second)
    assert bool((first > 1).all())
