"""Forward ``train`` and ``eval`` of schedule-free bases, also through Accelerate and Trainer (row 22)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import Alignment, Direction, GradGuide, Magnitude, guided
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


def vectors(model: nn.Module, optimizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parameters y and the averages x that are evaluated, each as one vector."""
    found = [torch.cat([p.detach().reshape(-1) for p in model.parameters()])]
    optimizer.eval()
    found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    optimizer.train()
    return found[0], found[1]


@pytest.mark.parametrize(
    "kind",
    [
        "SGDScheduleFree",
        "AdamWScheduleFree",
        "RAdamScheduleFree",
        "SGDScheduleFreeReference",
        "AdamWScheduleFreeReference",
    ],
)
@pytest.mark.parametrize("projects", [False, True])
def test_rules_on_the_update_change_parameters_and_averages_alike(kind: str, projects: bool) -> None:
    """The average x follows from y and z: if y alone were bounded, x would move away from the minimum."""
    model = kit.net(dtype=torch.float64)
    alignment = Alignment(kit.source_of(model, moving=False)) if projects else None
    base = getattr(schedulefree, kind)(model.parameters(), lr=0.3)
    magnitude = Magnitude(max_norm=1e9, max_update=1e-3)
    optimizer = GradGuide(base, alignment=alignment, magnitude=magnitude, names=model)
    optimizer.train()
    largest = 0.0
    for step in range(6):
        plain, other = copy.deepcopy((model, base))
        y, x = vectors(model, base)
        kit.train(model, optimizer, [step])
        kit.train(plain, other, [step])
        factor = optimizer.metrics()["update_factor"]
        y_change, x_change = (
            now - factor * made - (1 - factor) * before
            for now, made, before in zip(vectors(model, base), vectors(plain, other), (y, x), strict=True)
        )
        torch.testing.assert_close(x_change, y_change)
        largest = max(largest, float(y_change.norm()))
    assert factor < 0.5
    assert (largest > 1e-6) == projects


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
