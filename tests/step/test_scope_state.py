"""Statistics of scopes: new labels start from zero, and save and restore keep the values by label."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.rules.decide import STATISTICS
from gradguide.step.scope_state import ScopeState

CPU = torch.device("cpu")


def with_ones(*labels: str) -> ScopeState:
    state = ScopeState()
    state.locate(list(labels), CPU)
    state.statistics.fill_(1.0)
    return state


def test_labels_keep_their_row_and_new_ones_start_from_zero() -> None:
    state = ScopeState()
    first = state.locate(["a", "b"], CPU)
    state.statistics[first] = torch.arange(2.0 * len(STATISTICS), dtype=torch.float64).view(2, -1)
    again = state.locate(["c", "b", "a"], CPU)
    rows = state.statistics[again]
    assert not rows[0].any()
    assert rows[1].tolist() == [2.0, 3.0]
    assert rows[2].tolist() == [0.0, 1.0]


def test_an_export_is_a_copy_and_zero_for_an_unknown_label() -> None:
    state = with_ones("a")
    copy = state.export("a")
    state.statistics.zero_()
    assert torch.equal(copy, torch.ones(len(STATISTICS), dtype=torch.float64))
    assert torch.equal(state.export("other"), torch.zeros(len(STATISTICS), dtype=torch.float64))


def test_restored_statistics_replace_all_others() -> None:
    state = with_ones("a", "b")
    state.restore({"b": torch.full((len(STATISTICS),), 3.0)})
    places = state.locate(["a", "b"], CPU)
    assert not state.statistics[places[0]].any()
    assert bool((state.statistics[places[1]] == 3.0).all())
    state.restore({})
    place = state.locate(["b"], CPU)
    assert not state.statistics[place].any()


def test_a_pickle_of_a_version_with_other_statistics_is_refused() -> None:
    state = with_ones("a")
    state._values = torch.ones(1, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"with 5 statistics per scope, this one has 2: pass its state_dict\(\)"):
        pickle.loads(pickle.dumps(state))


def guided_by_module(names: str) -> tuple[nn.Sequential, GradGuide]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    given = model if names == "all" else [(n, p) for n, p in model.named_parameters() if n.startswith("0")]
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, GradGuide(base, direction=Direction(), scope="module", names=given)


def train(model: nn.Module, optimizer: GradGuide, steps: range) -> float:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) + 0.8
        optimizer.step()
    return optimizer.metrics()["coherence"]


def test_names_that_change_keep_the_statistics_of_a_module() -> None:
    found = []
    for prefix in ("", "model."):
        torch.manual_seed(0)
        model, optimizer = guided_by_module("all")
        train(model, optimizer, range(30))
        optimizer.set_alignment(None, names=[(prefix + name, p) for name, p in model.named_parameters()])
        found.append(train(model, optimizer, range(30, 32)))
    assert found[0] == found[1]
    assert found[0] < 0.9


def test_names_that_change_the_scopes_start_their_directions_from_zero_with_a_warning() -> None:
    model, optimizer = guided_by_module("some")
    train(model, optimizer, range(30))
    with pytest.warns(UserWarning, match=r"scopes of 4 parameters, such as 1\.weight: .* starts from zero") as caught:
        optimizer.set_alignment(None, names=model)
    assert caught[0].filename == __file__
    assert len(optimizer._engine.directions) == 2
    assert int(optimizer._engine.scopes.statistics.any(dim=1).sum()) == 1
    assert train(model, optimizer, range(30, 31)) < 1.0


def test_names_that_change_the_scopes_are_complete_where_the_warning_is_raised() -> None:
    model, optimizer = guided_by_module("some")
    train(model, optimizer, range(3))
    source = SourceGradient({name: torch.ones_like(p) for name, p in model.named_parameters()})
    with pytest.raises(UserWarning, match="the new names change the scopes"):
        optimizer.set_alignment(Alignment(source), names=model)  # warnings are errors in these tests
    train(model, optimizer, range(3, 5))
    assert optimizer.metrics()["source_cosine"] > 0


def test_a_parameter_that_joins_a_module_later_leaves_its_statistics() -> None:
    model = nn.Linear(4, 4)
    base = torch.optim.Adam([model.weight], lr=1e-3)
    optimizer = GradGuide(base, direction=Direction(), scope="module", names=model)
    train(model, optimizer, range(30))
    before = optimizer._engine.scopes.statistics.clone()
    optimizer.add_param_group({"params": [model.bias]})
    assert torch.equal(optimizer._engine.scopes.statistics, before)
