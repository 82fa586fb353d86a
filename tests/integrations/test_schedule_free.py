"""Forward ``train`` and ``eval`` of schedule-free bases, also through Accelerate and Trainer (row 22)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import Direction, GradGuide, guided
from tests.contract import kit
from tests.contract.test_trainer import bert, trainer_of

schedulefree = pytest.importorskip("schedulefree")

pytestmark = pytest.mark.filterwarnings("ignore")


def base_of(model: nn.Module) -> Any:
    return schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=2)


def train(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> None:
    """Train on the batches of ``steps``, and switch to the parameters for evaluation."""
    optimizer.train()
    kit.train(model, optimizer, steps)
    optimizer.eval()


def test_i22_rules_off_is_bitwise_the_schedule_free_base() -> None:
    model, plain = kit.net(), kit.net()
    train(model, GradGuide(base_of(model), direction=None, magnitude=None), range(5))
    train(plain, base_of(plain), range(5))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(plain))


def test_i22_guided_it_learns_and_resumes_from_where_it_is_evaluated(tmp_path: Path) -> None:
    model = kit.net()
    optimizer = GradGuide(base_of(model), direction=Direction())
    before = float(kit.loss_of(model, kit.batch(0)))
    train(model, optimizer, [0] * 40)
    assert float(kit.loss_of(model, kit.batch(0))) < 0.7 * before
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other_model = copy.deepcopy(model)
    other = GradGuide(base_of(other_model), direction=Direction())
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, optimizer, range(40, 44))
    train(other_model, other, range(40, 44))
    kit.assert_same(kit.parameters_of(other_model), kit.parameters_of(model))


@pytest.mark.usefixtures("fresh_accelerate")
def test_i22_accelerate_switches_the_base_through_gradguide() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = kit.net()
    optimizer = GradGuide(base_of(model), direction=Direction())
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    prepared.train()
    assert optimizer.param_groups[0]["train_mode"]
    prepared.eval()
    assert not optimizer.param_groups[0]["train_mode"]


@pytest.mark.usefixtures("fresh_accelerate")
def test_i22_trainer_trains_with_a_guided_schedule_free_class(tmp_path: Path) -> None:
    trainer = trainer_of(
        bert(), tmp_path, optimizer_cls_and_kwargs=(guided(schedulefree.AdamWScheduleFree), {"lr": 1e-2})
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.evaluate(trainer.train_dataset)
    assert not trainer.optimizer.param_groups[0]["train_mode"]
