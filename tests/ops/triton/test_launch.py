"""Count the launches of a step on CUDA, on the CPU: kernels that would be launched, and torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from benchmarks.registers import recorded
from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.step import nonfinite as finite
from tests.operations import Operations
from tests.ops.triton.problems import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="counted on the CPU, which needs Triton's interpreter")


def launches(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], list[str]]:
    """Return the kernels and operations of the third step."""
    monkeypatch.setattr(finite, "uses_found_inf", lambda measured, base, policy: True)  # as on CUDA, where it is fused
    held = [nn.Parameter(torch.ones(5, 3)) for _ in range(4)]
    names = [(f"layer{i // 2}.p{i}", p) for i, p in enumerate(held)]
    if "on" in options:
        source = SourceGradient({name: torch.ones(5, 3) for name, _ in names})
        options["alignment"] = Alignment(source, on=options.pop("on"), weight=1.0)
    decayed: list[Any] = [{"params": held[:2]}, {"params": held[2:], "weight_decay": 0.0}]
    base = AdamW(decayed if options.pop("groups", False) else held, fused=True)
    optimizer = GradGuide(base, names=names, backend="triton", **({"direction": Direction()} | options))
    for parameter in held:
        parameter.grad = torch.ones_like(parameter)
    # From the second step on, the device arrays are cached, as on CUDA, where the allocator reuses addresses.
    for _ in range(3):
        with recorded() as calls, Operations() as operations:
            optimizer.step()
    return [call.kernel.__name__ for call in calls], operations.names


def test_direction_a_source_and_clipping_are_five_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, operations = launches(monkeypatch, on="gradient", magnitude=Magnitude(max_update=None))
    assert kernels == ["measure", "finish", "decide", "adam", "count"]
    assert operations == []


def test_a_rule_on_the_update_adds_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"on": "update"}):
        kernels, operations = launches(monkeypatch, **options)
        assert kernels == ["measure", "finish", "decide", "probe", "total", "constrain_preview", "adam", "count"]
        assert operations == []


@pytest.mark.parametrize("more", [{"scope": "module"}, {"scope": "tensor"}, {"groups": True}], ids=str)
def test_more_scopes_and_groups_take_no_more_launches(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"on": "gradient", "magnitude": Magnitude(max_update=None)}, {"on": "update"}):
        assert launches(monkeypatch, **more, **options) == launches(monkeypatch, **options)
