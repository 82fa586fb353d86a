"""DistributedDataParallel, whose gradients are views of its buckets (row 18)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.contract import kit


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """Create a gloo group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def close(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i18_ddp_with_bucket_views_equals_the_plain_model(kind: str) -> None:
    model, plain = kit.net(), kit.net()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer, other = kit.guide(model, kit.adamw, kind), kit.guide(plain, kit.adamw, kind)
    pointers = []
    for step in range(5):
        optimizer.zero_grad(set_to_none=False)  # keeps the gradients as views of the buckets
        kit.loss_of(wrapped, kit.batch(step)).backward()
        held = [p.grad for p in model.parameters()]
        pointers.append([g.data_ptr() for g in held if g is not None])
        optimizer.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
        kit.train(plain, other, [step])
        # Not bitwise: the alignment of a view changes the rounding of sums.
        close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert len(pointers[-1]) == 4
    # From the second step: DDP rebuilds its buckets once, after the first backward.
    assert all(p == pointers[-1] for p in pointers[2:])
    storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    assert len(storages) == 1, "the gradients are views of one bucket"
    close(kit.parameters_of(model), kit.parameters_of(plain))
    close(kit.directions_of(optimizer), kit.directions_of(other))
    assert optimizer.metrics() == pytest.approx(other.metrics(), rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.usefixtures("group")
def test_i18_names_of_the_ddp_model_fit_a_source_of_the_plain_one() -> None:
    model, plain = kit.net(), kit.net()
    wrapped = DistributedDataParallel(model)
    names: dict[str, Any] = {"names": list(wrapped.named_parameters())}
    assert names["names"][0][0].startswith("module.")
    optimizer, other = kit.guide(model, kit.adamw, "on update", **names), kit.guide(plain, kit.adamw, "on update")
    for step in range(3):
        optimizer.zero_grad()
        kit.loss_of(wrapped, kit.batch(step)).backward()
        optimizer.step()
        kit.train(plain, other, [step])
    assert abs(optimizer.metrics()["source_cosine"]) > 0
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))
    assert torch.isfinite(torch.tensor(optimizer.metrics()["update_norm"]))
