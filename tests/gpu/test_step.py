"""Whole steps on a CUDA device: what they give, that they repeat, that the host does not wait, that graphs hold."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from gradguide.ops import Row, Write, foreach
from gradguide.ops import triton as ops
from gradguide.step import fused_adam
from gradguide.step.adam_bound import device as adam_bound_device
from tests.contract import kit
from tests.gpu.training import KINDS, WITHOUT_WAITING, Training, no_waiting, train

KIND = pytest.mark.parametrize("kind", KINDS)
UNREAD = pytest.mark.parametrize("kind", WITHOUT_WAITING)


@KIND
def test_steps_agree_with_the_portable_backend(kind: str) -> None:
    mine, other = (train(Training(kind, backend), 4) for backend in ("triton", "foreach"))
    torch.testing.assert_close(mine.parameters(), other.parameters(), rtol=1e-3, atol=1e-4)
    found, wanted = mine.optimizer.metrics(), other.optimizer.metrics()
    del found["update_norm"], wanted["update_norm"]  # the fused step measures it always
    assert found == pytest.approx(wanted, rel=1e-2, abs=1e-3, nan_ok=True)


@KIND
def test_the_same_run_gives_the_same_bits(kind: str) -> None:
    first, second = (train(Training(kind), 5) for _ in range(2))
    kit.assert_same(first.parameters(), second.parameters())
    kit.assert_same(first.optimizer.state_dict(), second.optimizer.state_dict())


@UNREAD
def test_the_host_does_not_wait(kind: str) -> None:
    training = train(Training(kind), 2)  # which fills tables and states, and compiles
    training.fill(2)
    torch.cuda.synchronize()
    with no_waiting():
        training.step()
    assert training.optimizer.metrics()["steps"] == 3


def test_waiting_would_be_noticed() -> None:
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        float(torch.ones((), device="cuda"))


@UNREAD
def test_a_whole_training_step_is_captured_in_a_graph(kind: str) -> None:
    """Gradients are made anew within the capture, so that their addresses are the graph's own."""
    training, eager = Training(kind), train(Training(kind), 8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(training, 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    training.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        training.step()
    for step in range(3, 8):
        training.fill(step)
        graph.replay()
    torch.testing.assert_close(training.parameters(), eager.parameters(), rtol=1e-4, atol=1e-5)
    assert training.optimizer.metrics()["steps"] == eager.optimizer.metrics()["steps"] == 8
    # Steps outside of the graph go on, and leave its tables alone.
    train(training, 2)
    before = training.parameters()
    training.fill(8)
    graph.replay()
    assert kit.differ(training.parameters(), before)


def test_a_step_that_is_not_finite_is_left_out_without_the_host() -> None:
    training = train(Training("defaults"), 2)
    before = kit.snapshot(training.model, training.optimizer)
    training.fill(2)
    training.x[0, 0] = float("nan")
    with no_waiting():
        training.step()
    after = kit.snapshot(training.model, training.optimizer)
    kit.assert_same(after["parameters"], before["parameters"])
    assert after["counts"] == {"steps": before["counts"]["steps"], "skipped": 1.0}


def test_a_proof_of_the_bound_saves_a_pass_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    preview = Mock(side_effect=fused_adam.preview_products)
    monkeypatch.setattr(fused_adam, "preview_products", preview)
    runs = []
    for least in (1 << 18, 0):  # the tensors are smaller, so that the first run measures
        monkeypatch.setattr(adam_bound_device, "PAYS", least)
        training = Training("defaults")
        training.optimizer.param_groups[0]["lr"] = 5e-5
        for step in range(6):
            training.fill(step)
            torch.cuda.synchronize()  # the numbers of the state have arrived
            preview.reset_mock()
            with no_waiting() if step else nullcontext():
                training.step()
        assert preview.called == (least > 0)
        runs.append(training.parameters())
    assert not kit.differ(*runs)


def test_the_fused_step_keeps_no_copy_of_the_parameters() -> None:
    training = train(Training("defaults"), 2)
    held = torch.cuda.memory_allocated()
    training.fill(2)
    torch.cuda.reset_peak_memory_stats()
    training.optimizer.step()
    size = sum(p.numel() * p.element_size() for p in training.model.parameters())
    assert torch.cuda.max_memory_allocated() - held < size


@pytest.mark.parametrize("size", [2**24 + 3, 2**31 + 5], ids=["large", "past 2^31"])
def test_large_tensors(size: int) -> None:
    """Against the portable backend, in bfloat16, so that the larger ones take 4 GiB each."""
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * size:
        pytest.skip(f"needs {10 * size / 2**30:.0f} GiB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    g = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
    d = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
    rows: list[Row | None] = [Row(offset=[g]), Row(offset=[d])]
    found, wanted = ops.gram(rows)[0], foreach.gram(rows)[0]
    scale = wanted.diagonal().sqrt()
    assert ((found - wanted).abs() <= 1e-5 * scale.outer(scale)).all()
    assert torch.equal(found, ops.gram(rows)[0])
    last = (2.0 * g[-100:].float() - 0.5 * d[-100:].float()).bfloat16()
    weights = torch.tensor([[2.0, -0.5]], dtype=torch.float64, device="cuda")
    ops.combine_(rows, [Write(into=[g], coefficients=weights)])
    torch.testing.assert_close(g[-100:], last, rtol=1e-2, atol=1e-2)
