"""Real training loops of Accelerate and Lightning around GradGuide (rows 1, 4, 10, 22, 23)."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradguide import GradGuide, unwrap
from tests.contract import kit


def rows(count: int) -> TensorDataset:
    x, y = kit.batch(0, size=count)
    return TensorDataset(x, y)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i10_accelerate_with_accumulation_equals_large_batches(kind: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, plain = kit.net(), kit.net()
    optimizer, other = kit.guide(model, kit.adamw, kind), kit.guide(plain, kit.adamw, kind)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    other_scheduler = torch.optim.lr_scheduler.LinearLR(other, total_iters=4)
    loader = DataLoader(rows(24), batch_size=2)
    wrapped, prepared, loader, prepared_scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    assert unwrap(prepared) is optimizer
    assert prepared.param_groups is optimizer.base.param_groups
    assert prepared.state is optimizer.base.state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(kit.loss_of(wrapped, batch))
                prepared.step()
                prepared_scheduler.step()
                prepared.zero_grad()
    for x, y in DataLoader(rows(24), batch_size=6):
        other.zero_grad()
        kit.loss_of(plain, (x, y)).backward()
        other.step()
        other_scheduler.step()

    assert optimizer.metrics()["steps"] == other.metrics()["steps"] == 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"])
    torch.testing.assert_close(kit.directions_of(optimizer), kit.directions_of(other), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(kit.parameters_of(model), kit.parameters_of(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("fresh_accelerate")
def test_i04_accelerate_prepares_a_gradguide_that_has_stepped() -> None:
    """prepare() passes the state through state_dict and load_state_dict, which must be lossless."""
    from accelerate import Accelerator

    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(3))
    before = kit.snapshot(model, optimizer)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    assert unwrap(prepared) is optimizer
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert prepared.param_groups is optimizer.base.param_groups


@pytest.mark.usefixtures("fresh_accelerate")
def test_i03_accelerate_save_state_and_load_state(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    kit.train(wrapped, prepared, range(3))
    kept = kit.snapshot(model, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    kit.train(wrapped, prepared, range(3, 5))
    assert kit.differ(kit.parameters_of(model), kept["parameters"])
    accelerator.load_state(str(tmp_path / "state"))
    loaded = kit.snapshot(model, optimizer)
    del loaded["gradients"], kept["gradients"]
    kit.assert_same(loaded, kept)


def lightning_module(kind: str, *, automatic: bool = True) -> Any:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = kit.net()
            self.found: list[Any] = []
            self.automatic_optimization = automatic

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            optimizer: Any = self.optimizers()
            self.found.append(unwrap(optimizer))
            loss = kit.loss_of(self.net, batch)
            if not automatic:
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            self.guide = kit.guide(self.net, kit.adamw, kind)
            return [self.guide], [torch.optim.lr_scheduler.LinearLR(self.guide, total_iters=4)]

    return Module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("accumulate", "automatic"), [(1, True), (2, True), (1, False)])
def test_i22_lightning_trainer_equals_the_plain_loop(accumulate: int, automatic: bool, tmp_path: Path) -> None:
    """Lightning wraps the optimizer in its own class, and steps with a closure unless the module steps itself."""
    pytest.importorskip("lightning")
    from lightning.pytorch import Trainer
    from lightning.pytorch.core.optimizer import LightningOptimizer

    module = lightning_module("on update", automatic=automatic)
    # Its source uses the names of `net`, which the plain copy shares.
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(module, DataLoader(rows(24), batch_size=6 // accumulate))
    plain = kit.net()
    other = kit.guide(plain, kit.adamw, "on update")
    torch.optim.lr_scheduler.LinearLR(other, total_iters=4)  # Lightning steps it only after the epoch
    for x, y in DataLoader(rows(24), batch_size=6):
        other.zero_grad()
        kit.loss_of(plain, (x, y)).backward()
        other.step()
    guide: GradGuide = module.guide
    assert guide.metrics()["steps"] == 4
    assert all(found is guide for found in module.found), "unwrap finds GradGuide itself"
    assert unwrap(LightningOptimizer(guide.base)) is None
    torch.testing.assert_close(kit.parameters_of(module.net), kit.parameters_of(plain), rtol=1e-3, atol=1e-4)
    if accumulate == 1:
        kit.assert_same(kit.parameters_of(module.net), kit.parameters_of(plain))


@pytest.mark.usefixtures("fresh_accelerate")
def test_i22_accelerate_train_and_eval_are_no_ops_over_gradguide() -> None:
    """Accelerate checks hasattr before it forwards, so GradGuide must not always have train()."""
    optimizer = kit.guide(kit.net(), kit.adamw)
    from accelerate import Accelerator

    prepared = Accelerator(cpu=True).prepare(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    prepared.train()
    prepared.eval()
    kit.assert_same(optimizer.state_dict(), before)


class Holder(nn.Module):
    """A module that stores its optimizer, as trainers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = kit.net()
        self.optimizer = kit.guide(self.net, kit.adamw)


def test_i22_unwrap_finds_what_a_module_holds_and_copies_keep_it() -> None:
    other = copy.deepcopy(Holder())
    assert isinstance(other.optimizer, GradGuide)
    assert unwrap(other) is other.optimizer
    held = {id(p) for group in other.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in other.net.parameters()}
