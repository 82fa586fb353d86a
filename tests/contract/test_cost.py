"""No step synchronizes with the device unnecessarily (row 24): host reads, counted on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradguide.step import nonfinite as finite
from tests.contract import kit


class Reads(TorchDispatchMode):
    """Counts operations that copy a value to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        self.count += name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def test_i24_the_counter_counts() -> None:
    with Reads() as reads:
        assert bool(torch.ones(1).sum() > 0)
        torch.ones(1).item()
    assert reads.count == 2


@pytest.mark.parametrize("scope", kit.SCOPES)
@pytest.mark.parametrize("kind", ["no source", "on update", "on gradient"])
def test_i24_no_host_read_in_a_step_of_the_portable_backend(
    kind: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one source: with several, the projection has a shortcut on the CPU that reads."""
    monkeypatch.setattr("gradguide.ops.foreach._on_cpu", lambda device: False)
    monkeypatch.setattr(finite, "uses_found_inf", lambda measured, base, policy: True)  # as with a fused base on CUDA
    model = kit.net()
    optimizer = kit.guide(model, lambda groups: kit.sgd(groups, fused=True), kind, scope, backend="foreach")
    kit.train(model, optimizer, range(2))
    kit.give_gradients(model, 5)
    with Reads() as reads, monkeypatch.context() as patch:
        # These read without an operation that the mode can intercept.
        for name in ("tolist", "numpy"):
            patch.setattr(torch.Tensor, name, None, raising=False)
        optimizer.step()
    assert reads.count == 0
    assert optimizer.metrics()["steps"] == 3
