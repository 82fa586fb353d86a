"""Statistics of scopes: new labels start from zero, and save and restore keep the values by label."""

from __future__ import annotations

import pickle

import pytest
import torch

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
