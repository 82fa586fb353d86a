"""Use several sources: names, weights, and changes during training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gradguide import Alignment, Direction, GradGuide, Regularizer, SourceGradient
from tests.contract import kit


def source(seed: int, *, moving: bool = True) -> SourceGradient:
    return kit.source_of(kit.net(), seed=seed, moving=moving)


def guide(model: Any, alignment: Alignment | None, **options: Any) -> GradGuide:
    options = {"direction": Direction()} | options
    return GradGuide(kit.adamw(model.parameters()), alignment=alignment, names=model.named_parameters(), **options)


def test_names_tell_the_metrics_apart() -> None:
    model, twin = kit.net(), kit.net()
    named = guide(model, Alignment({"films": source(1), "home": source(2)}))
    plain = guide(twin, Alignment([source(1), source(2)]))
    kit.train(model, named, range(3))
    kit.train(twin, plain, range(3))
    ours, theirs = named.metrics(), plain.metrics()
    assert ours["source_cosine/films"] == theirs["source_cosine/0"]
    assert ours["conflict/home"] == theirs["conflict/1"]
    assert ours["source_cosine"] == min(ours["source_cosine/films"], ours["source_cosine/home"])
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(twin))


def test_each_source_has_a_weight_of_its_own() -> None:
    """A source of weight 0 has no pull."""
    model, twin = kit.net(), kit.net()
    both = guide(model, Alignment([source(1), source(2)], weight=[0.7, 0.0], project=False))
    one = guide(twin, Alignment(source(1), weight=0.7, project=False))
    kit.train(model, both, range(4))
    kit.train(twin, one, range(4))
    torch.testing.assert_close(kit.parameters_of(model), kit.parameters_of(twin), rtol=1e-5, atol=1e-7)


def test_sixteen_named_sources() -> None:
    model = kit.net()
    optimizer = guide(model, Alignment({f"task{k}": source(k, moving=k % 2 == 0) for k in range(16)}, weight=0.01))
    kit.train(model, optimizer, range(5))
    found = optimizer.metrics()
    assert sum(key.startswith("source_cosine/task") for key in found) == 16
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("change", ["dropped", "added", "all dropped"])
def test_sources_change_mid_run_and_checkpoints_follow(change: str) -> None:
    model = kit.net()
    two = {"films": source(1), "home": source(2)}
    before = Alignment(two if change != "added" else {"films": source(1)}, weight=0.3)
    after = {
        "dropped": Alignment({"home": source(2)}, weight=0.3),
        "added": Alignment(two, weight=0.3),
        "all dropped": None,
    }[change]
    optimizer = guide(model, before)
    kit.train(model, optimizer, range(3))
    directions = kit.directions_of(optimizer)
    optimizer.set_alignment(after)
    kit.assert_same(kit.directions_of(optimizer), directions)
    kit.train(model, optimizer, range(3, 5))
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    kit.train(model, optimizer, range(5, 8))
    assert optimizer.metrics()["steps"] == 8

    other = kit.net(seed=3)
    resumed = guide(other, after)
    other.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    kit.train(other, resumed, range(5, 8))
    kit.assert_same(kit.parameters_of(other), kit.parameters_of(model))
    assert (after is None) == ("source_cosine/home" not in optimizer.metrics() and change == "all dropped")


def test_a_set_that_does_not_fit_changes_nothing() -> None:
    model, twin = kit.net(), kit.net()
    optimizer, plain = guide(model, Alignment(source(1))), guide(twin, Alignment(source(1)))
    with pytest.raises(ValueError, match="does not match the optimizer's named parameters"):
        optimizer.set_alignment(Alignment(SourceGradient({"w": torch.ones(2)})))
    with pytest.raises(TypeError, match="alignment must be an Alignment or None"):
        optimizer.set_alignment([source(1)])  # type: ignore[arg-type]
    kit.train(model, optimizer, range(3))
    kit.train(twin, plain, range(3))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(twin))


def test_the_regularizers_sources_stay() -> None:
    model = kit.net()
    terms = Regularizer(alignment=0.2, source=source(5), warmup=0)
    optimizer = guide(model, Alignment(source(1)), regularizer=terms)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = kit.loss_of(model, kit.batch(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.set_alignment(Alignment([source(2), source(3)]))
    optimizer.step(closure)
    assert optimizer.metrics()["steps"] == 2
    assert len(optimizer._engine.planner.sources) == 3


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0], ValueError, "one for each of 2 sources, found 1"),
        ([1.0, -1.0], ValueError, r"weight must be in \[0, inf\), found -1.0"),
        ([1.0, "2"], TypeError, "weight must be a number"),
    ],
)
def test_bad_weights(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Alignment([source(1), source(2)], weight=weight)
