"""Run captures in each mode, and preserve buffers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradguide import SourceGradient

from .problems import answer


class Detector(nn.Module):
    """A model with a loss in train mode only, like torchvision's detectors, batch norm, and a replaced buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> dict[str, Tensor] | list[Tensor]:
        self.steps = self.steps + 1
        scores = self.head(self.norm(x))
        return {"loss": scores.square().mean()} if self.training else [scores]


def keyed(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model(batch)["loss"]
    return value


def switching(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model.train()(batch)["loss"]
    return value


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, 4, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(("loss", "mode"), [(keyed, "train"), (keyed, "keep"), (switching, "eval")])
@pytest.mark.parametrize("fails", [False, True])
def test_a_loss_in_train_mode_leaves_modes_and_buffers(
    loss: Callable[[nn.Module, Tensor], Tensor], mode: str, fails: bool
) -> None:
    model = Detector()
    model.train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}

    def maybe(m: nn.Module, batch: Tensor) -> Tensor:
        value = loss(m, batch)
        return value * torch.nan if fails and model.steps > 1 else value

    if fails:
        with pytest.raises(ValueError, match="batch 1 has a loss of nan"):
            SourceGradient.capture(model, data(), maybe, mode=mode)
    else:
        source = SourceGradient.capture(model, data(), maybe, mode=mode)
        assert answer(source)["head.bias"].any()
    assert [module.training for module in model.modules()] == modes
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys()
    assert {"norm.running_mean", "norm.num_batches_tracked", "steps"} < after.keys()
    for name, (buffer, value) in buffers.items():
        assert after[name] is buffer
        assert torch.equal(buffer, value), name


def test_a_loss_in_eval_mode_is_the_default() -> None:
    with pytest.raises(TypeError, match="list indices"):
        SourceGradient.capture(Detector(), data(), keyed)


def test_modes_give_the_gradients_of_their_modes() -> None:
    model = Detector()
    model.norm(torch.randn(16, 4) * 3 + 1)  # running statistics that differ from those of a batch
    model.norm.eval()
    batch = data()[0]

    def plain(m: nn.Module, x: Tensor) -> Tensor:
        value: Tensor = m.get_submodule("head")(m.get_submodule("norm")(x)).square().mean()
        return value

    def captured(mode: str) -> Tensor:
        return answer(SourceGradient.capture(model, [batch], plain, curvature=False, mode=mode))["head.weight"]

    def by_hand(training: bool) -> Tensor:
        norm = nn.functional.batch_norm(
            batch, model.norm.running_mean, model.norm.running_var, model.norm.weight, model.norm.bias, training, 0.0
        )
        model.head.zero_grad()
        model.head(norm.detach()).square().mean().backward()
        assert model.head.weight.grad is not None
        return model.head.weight.grad.clone()

    wanted = {mode: by_hand(training=mode == "train") for mode in ("eval", "train", "keep")}
    assert not torch.allclose(wanted["eval"], wanted["train"], rtol=0.1)
    for mode, gradient in wanted.items():
        torch.testing.assert_close(captured(mode).view(2, 4).float(), gradient, msg=mode)


def test_buffers_of_packed_weights_are_not_copied() -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("packed", torch.zeros(2, 2, dtype=torch.uint8))
    packed = model.get_buffer("packed")

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        m.get_buffer("packed").add_(1)
        return m(batch).mean()  # type: ignore[no-any-return]

    SourceGradient.capture(model, [torch.ones(1, 2)], loss, curvature=False)
    assert model.get_buffer("packed") is packed
    assert packed.eq(1).all()
