"""Steps skipped by a flag on the device. Only CUDA uses it; fused bases on the CPU support it and are tested here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from gradguide import GradGuide
from gradguide.step import nonfinite as finite


@pytest.mark.parametrize("kind", [AdamW, Adam, SGD])
def test_a_fused_base_leaves_the_step_out_itself(kind: type[AdamW], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_uses_found_inf", lambda measured, base, policy: True)
    results = []
    for skipped in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = GradGuide(kind(model.parameters(), lr=0.1, fused=True))
        for step in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            optimizer.step()
            if skipped and step == 1:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, float("nan"))
                optimizer.step()
                assert optimizer.metrics()["skipped"] == 1
        assert not hasattr(optimizer.base, "found_inf")
        assert optimizer.metrics()["steps"] == 4
        directions = [entry["gradguide.direction"] for entry in optimizer.state_dict()["state"].values()]
        results.append([*model.parameters(), *directions])
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
