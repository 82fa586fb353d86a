"""Structured sources on a CUDA device: capture and pull equal those of the CPU, also with layers on both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradguide import Alignment, Direction, GradGuide, StructuredSource
from tests.sources.structured.gloo_rank import drawn
from tests.sources.structured.problems import adapted, llama, spread, text, trained


def moved(device: str, *, split: bool = False) -> nn.Module:
    """Return a model with an adapter whose B is not zero; if split, its layers but the first are on the device."""
    model = adapted(llama())
    spread(model, 0.05)
    if not split:
        return model.to(device)
    for name, module in model.named_modules():
        if name.endswith("layers.1"):
            module.to(device)
    return model


def batches(device: str) -> list[dict[str, Tensor]]:
    return [{name: value.to(device) for name, value in batch.items()} for batch in text(4)]


def pull(source: StructuredSource, model: nn.Module) -> tuple[dict[str, Tensor], float]:
    bound = source.bound(model)
    parameters = trained(model)
    bound.refresh(parameters, [])
    rows = {name: bound.row([name], [p]).value(0, torch.float64) for name, p in parameters.items()}
    assert all(row.device == parameters[name].device for name, row in rows.items())
    assert bound.drift is not None
    return {name: row.cpu() for name, row in rows.items()}, float(bound.drift)


@pytest.mark.parametrize("rank", [8, None])
def test_capture_and_pull_equal_those_of_the_cpu(rank: int | None) -> None:
    on_cpu = StructuredSource.capture(llama(), batches("cpu"), drawn, rank=rank)
    on_device = StructuredSource.capture(llama().to("cuda"), batches("cuda"), drawn, rank=rank)
    for name in on_cpu.names():
        for ours, theirs in zip(on_device.factors(name), on_cpu.factors(name), strict=True):
            assert float((ours - theirs).norm()) < 1e-3 * float(theirs.norm()), name
    wanted, drift = pull(on_cpu, moved("cpu"))
    for split in (False, True):
        rows, found = pull(on_cpu, moved("cuda", split=split))
        assert found == pytest.approx(drift, rel=1e-4)
        for name, row in rows.items():
            assert float((row - wanted[name]).norm()) <= 1e-4 * float(wanted[name].norm()) + 1e-9, name


def test_a_step_of_layers_on_two_devices() -> None:
    source = StructuredSource.capture(llama(), batches("cpu"), drawn, rank=8)
    results = []
    for split in (False, True):
        model = moved("cuda", split=True) if split else moved("cpu")
        base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
        optimizer = GradGuide(base, alignment=Alignment(source), names=model, direction=Direction())
        for step in range(3):
            for index, p in enumerate(trained(model).values()):
                generator = torch.Generator().manual_seed(100 * step + index)
                p.grad = torch.randn(p.shape, generator=generator).to(p.device)
            optimizer.step()
        results.append([p.detach().cpu() for p in trained(model).values()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)
