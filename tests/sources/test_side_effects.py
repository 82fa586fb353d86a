"""Extra passes leave gradients, buffers and random state as they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradguide.sources.side_effects import RandomState, check_hooks, leaves, preserve_buffers, preserve_gradients


def test_the_random_state_is_restored() -> None:
    state = RandomState([torch.zeros(1)])
    first = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(("device", "which"), [("cuda", (1,)), ("xpu", (1,)), ("mps", ())])
def test_the_random_state_of_other_devices_is_restored(
    monkeypatch: pytest.MonkeyPatch, device: str, which: tuple[int, ...]
) -> None:
    """Second passes drew other dropout masks where the device is neither the host nor CUDA."""
    states = {which: 1}
    module = SimpleNamespace(
        get_rng_state=lambda *index: states[index], set_rng_state=lambda new, *index: states.update({index: new})
    )
    monkeypatch.setattr(torch, device, module)
    held: Any = [SimpleNamespace(device=torch.device(device, 1))] * 2
    state = RandomState([*held, torch.zeros(1), torch.zeros(1, device="meta")])
    states[which] = 2
    state.restore()
    assert states == {which: 1}


def test_buffers_of_the_modules_that_ran_are_restored_also_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before = {name: (b, b.clone()) for name, b in model.named_buffers()}

    def fail() -> None:
        with preserve_buffers():
            model(torch.randn(4, 2))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    for name, b in model.named_buffers():
        assert b is before[name][0]
        assert torch.equal(b, before[name][1]), name


def test_buffers_of_given_models_are_restored_if_their_code_calls_no_hooks() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before = {name: (b, b.clone()) for name, b in model.named_buffers()}
    with preserve_buffers([model]):
        model[0].register_buffer("running_mean", torch.ones(2))
        for b in model.buffers():
            b.add_(1)
    for name, b in model.named_buffers():
        assert b is before[name][0]
        assert torch.equal(b, before[name][1]), name


def test_gradients_are_none_inside_and_the_same_bits_afterwards() -> None:
    with_gradient, without = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with_gradient.grad = gradient = torch.tensor([1.0, 2.0])
    with preserve_gradients([with_gradient, without]) as copies:
        assert [p.grad for p in (with_gradient, without)] == [None, None]
        assert copies.keys() == {with_gradient}
        gradient.zero_()  # as by another backward pass into the buffer of DDP
        without.grad = torch.ones(2)
    assert with_gradient.grad is gradient
    assert torch.equal(gradient, torch.tensor([1.0, 2.0]))
    assert without.grad is None


def test_a_sparse_gradient_is_kept() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    gradient = table.weight.grad
    with preserve_gradients([table.weight]):
        table(torch.tensor([2])).sum().backward()
    assert table.weight.grad is gradient
    assert gradient is not None
    assert torch.equal(gradient.to_dense()[:, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]))


def test_leaves_are_those_that_backward_reaches() -> None:
    a, b, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    assert set(leaves((a * b + a).sum())) == {a, b}
    assert leaves(unused) == [unused]
    assert leaves((a.detach() * b).sum()) == [b]


def test_hooks_that_the_pass_would_run_are_refused_by_name() -> None:
    plain, hooked = (nn.Parameter(torch.ones(2)) for _ in range(2))
    check_hooks([plain], {})
    handle = hooked.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match=r"head\.weight has a hook that runs in backward"):
        check_hooks([plain, hooked], {hooked: "head.weight"})
    with pytest.raises(RuntimeError, match="a parameter has a hook"):
        check_hooks([hooked], {})
    handle.remove()
    check_hooks([plain, hooked], {})
