"""Save, load, continue (rows 3, 4, 14, 21)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradguide import Direction, GradGuide, Magnitude
from gradguide.checkpoint import state_dict as checkpoint
from gradguide.checkpoint.entries import COUNTERS
from tests.contract import kit


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from leaves(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry)
    else:
        yield value


@pytest.mark.parametrize("scope", kit.SCOPES)
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i03_save_load_continue_equals_uninterrupted_bitwise(kind: str, scope: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind, scope)
    kit.train(model, optimizer, range(4))
    saved = kit.through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    resumed_model = kit.net(seed=1)
    resumed_model.load_state_dict(saved["model"])
    resumed = kit.guide(resumed_model, kit.adamw, kind, scope)
    # The source is not part of the state. Rebuild it from the model at capture.
    if kind != "no source":
        names = list(resumed_model.named_parameters())
        resumed = kit.guide(resumed_model, kit.adamw, kind, scope, **(kit.options(kind, kit.net()) | {"names": names}))
    resumed.load_state_dict(saved["optimizer"])
    for held in (optimizer, resumed):
        assert held.metrics()["steps"] == 4
    kit.assert_same(resumed.state_dict(), optimizer.state_dict())

    kit.train(model, optimizer, range(4, 9))
    kit.train(resumed_model, resumed, range(4, 9))
    kit.assert_same(kit.snapshot(resumed_model, resumed), kit.snapshot(model, optimizer))
    kit.assert_same(resumed.metrics(), optimizer.metrics())


def test_i03_a_lost_direction_would_show() -> None:
    """The test above can fail: without GradGuide's state, the run differs."""
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(4))
    twin = kit.net()
    twin.load_state_dict(model.state_dict())
    other = kit.guide(twin, kit.adamw)
    with pytest.warns(UserWarning):
        other.load_state_dict(optimizer.base.state_dict())
    kit.train(model, optimizer, range(4, 6))
    kit.train(twin, other, range(4, 6))
    assert kit.differ(kit.parameters_of(twin), kit.parameters_of(model))


def test_i03_a_state_of_format_1_goes_on_like_the_one_it_came_from() -> None:
    """Format 1 has three further numbers per scope, of a rule that was removed. They are not read."""
    model, twin = kit.net(), kit.net()
    optimizer, resumed = kit.guide(model, kit.adamw), kit.guide(twin, kit.adamw)
    kit.train(model, optimizer, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        _, *numbers, _, _ = entry[COUNTERS].tolist()
        entry[COUNTERS] = torch.tensor([1.0, *numbers, 3.8, float("nan"), -0.2], dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(kit.through_file(state))
    kit.assert_same(resumed.state_dict(), optimizer.state_dict())
    kit.train(model, optimizer, range(4, 7))
    kit.train(twin, resumed, range(4, 7))
    kit.assert_same(kit.snapshot(twin, resumed), kit.snapshot(model, optimizer))


def test_i03_skipped_steps_are_counted_on_across_a_load() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(2))
    kit.give_gradients(model, 0, scale=float("nan"))
    optimizer.step()
    resumed = kit.guide(kit.net(), kit.adamw)
    resumed.load_state_dict(kit.through_file(optimizer.state_dict()))
    assert {k: resumed.metrics()[k] for k in ("steps", "skipped")} == {"steps": 2, "skipped": 1}


@pytest.mark.parametrize("kind", ["defaults", "no source"])
def test_i03_the_base_alone_loads_a_state_in_which_a_parameter_had_skipped_steps_only(kind: str) -> None:
    """AdamW takes an entry with own keys for its own, and raised KeyError."""
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind)
    kit.give_gradients(model, 0, scale=float("nan"))
    optimizer.step()
    kit.give_gradients(model, 0)
    model[0].weight.grad = None
    optimizer.step()
    plain = kit.guide(model, kit.adamw).base
    plain.load_state_dict(kit.through_file(optimizer.state_dict()))
    kit.train(model, plain, range(1))
    resumed = kit.guide(model, kit.adamw, kind)
    resumed.load_state_dict(optimizer.state_dict())
    kit.train(model, resumed, range(1))
    assert {name: resumed.metrics()[name] for name in ("steps", "skipped")} == {"steps": 2, "skipped": 1}


def test_i03_loaded_direction_and_counters_are_not_shared_with_the_state() -> None:
    """Torch shares the base's tensors with the loaded dict; GradGuide copies its own."""
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    ours = {(i, k): v for i, entry in saved["state"].items() for k, v in entry.items() if k.startswith("gradguide.")}
    kept = copy.deepcopy(ours)
    twin = kit.net()
    other = kit.guide(twin, kit.adamw)
    other.load_state_dict(saved)
    kit.train(twin, other, range(3))
    assert len(kept) == 8
    kit.assert_same(ours, kept)


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i21_state_is_tensors_and_primitives(kind: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind, "module")
    kit.train(model, optimizer, range(2))
    state = optimizer.state_dict()
    odd = [leaf for leaf in leaves(state) if not isinstance(leaf, (Tensor, int, float, str, bool, type(None)))]
    assert odd == []
    assert all(type(leaf) in (Tensor, nn.Parameter) for leaf in leaves(state) if isinstance(leaf, Tensor))
    assert set(state) == {"state", "param_groups"}
    kit.assert_same(kit.through_file(state), state)


def test_i21_before_the_first_step_the_state_is_the_bases() -> None:
    model, twin = kit.net(), kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.assert_same(optimizer.state_dict(), optimizer.base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kit.guide(twin, kit.adamw).load_state_dict(optimizer.state_dict())


def plain_state() -> dict[str, Any]:
    """Return the state of a plain AdamW after three steps over the groups of kit.guide."""
    model = kit.net()
    parameters = list(model.parameters())
    bare = kit.adamw([{"params": parameters[:1]}, {"params": parameters[1:]}])
    kit.train(model, bare, range(3))
    return bare.state_dict()


def test_i21_plain_base_checkpoint_loads_with_one_warning_and_starts_direction_anew() -> None:
    state = plain_state()
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(copy.deepcopy(state))
    assert len(caught) == 1
    assert issubclass(caught[0].category, UserWarning)
    assert "plain base" in str(caught[0].message)
    assert "flatten_optimizer_state_dict" in str(caught[0].message), "torch then leaves out GradGuide's entries"
    assert caught[0].filename == __file__, "the warning must point at the caller's line"
    kit.assert_same(optimizer.base.state_dict(), state)
    kit.assert_same(optimizer.state_dict(), state)
    assert optimizer.metrics()["steps"] == 0
    fresh = kit.net()
    fresh.load_state_dict(model.state_dict())
    other = kit.guide(fresh, kit.adamw)
    other.base.load_state_dict(state)
    kit.train(model, optimizer, range(3, 6))
    kit.train(fresh, other, range(3, 6))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(fresh))


def test_i21_plain_checkpoint_does_not_warn_where_nothing_is_missed() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, direction=None, magnitude=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(plain_state())


def test_i21_state_of_other_rules_loads() -> None:
    """Rules may change between runs: an unused direction is dropped with a warning, a missing one starts at zero."""
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(3))
    state = optimizer.state_dict()
    without = kit.guide(kit.net(), kit.adamw, direction=None)
    with pytest.warns(UserWarning, match=r"has a running direction, which is dropped.*Pass direction=Direction\(\)"):
        without.load_state_dict(copy.deepcopy(state))
    assert kit.directions_of(without) == {}
    kit.assert_same(without.base.state_dict(), optimizer.base.state_dict())
    again = kit.guide(kit.net(), kit.adamw, direction=Direction(decay=0.5), magnitude=Magnitude(max_norm=0.5))
    again.load_state_dict(without.state_dict())
    twin = kit.net()
    other = kit.guide(twin, kit.adamw, direction=Direction(decay=0.5))
    other.load_state_dict(without.state_dict())
    kit.train(twin, other, range(2))
    assert all(p.isfinite().all() for p in twin.parameters())
    assert other.metrics()["coherence"] <= 1.0


def warnings_of_loading(optimizer: GradGuide, state: dict[str, Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(state)
    return caught


def assert_direction_dropped(optimizer: GradGuide, caught: list[warnings.WarningMessage]) -> None:
    """Assert that one warning names the caller's line, and that the counts of three steps are all that was kept."""
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not optimizer._engine.scopes.statistics.any()
    assert kit.directions_of(optimizer) == {}
    assert optimizer.metrics()["steps"] == 3


KINDS_OF_DIRECTION = {
    "None": None,
    "Direction()": Direction(),
    "Direction(share_momentum=True)": Direction(share_momentum=True),
}


@pytest.mark.parametrize("now", KINDS_OF_DIRECTION)
@pytest.mark.parametrize("then", ["Direction()", "Direction(share_momentum=True)"])
def test_i21_statistics_of_another_kind_of_direction_are_dropped_with_a_warning(then: str, now: str) -> None:
    model, twin = kit.net(), kit.net()
    optimizer = kit.guide(model, kit.adamw, direction=KINDS_OF_DIRECTION[then])
    kit.train(model, optimizer, range(3))
    state = kit.through_file(optimizer.state_dict())
    other = kit.guide(twin, kit.adamw, direction=KINDS_OF_DIRECTION[now])
    caught = warnings_of_loading(other, state)
    if then == now:
        assert not caught
        kit.assert_same(other.state_dict(), state)
        return
    assert_direction_dropped(other, caught)
    assert f"dropped: this optimizer has direction={now}" in str(caught[0].message)
    assert f"Pass direction={then} to continue" in str(caught[0].message)
    kit.assert_same(other.base.state_dict(), optimizer.base.state_dict())


@pytest.mark.parametrize("now", kit.SCOPES)
@pytest.mark.parametrize("then", kit.SCOPES)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_i21_a_direction_of_other_scopes_is_dropped_with_a_warning(then: str, now: str, shared: bool) -> None:
    """Its length in a scope is that of the scope's part of the gradients, so its coherence was wrong."""
    model, twin = kit.net(), kit.net()
    kind = Direction(share_momentum=shared)
    optimizer = kit.guide(model, kit.adamw, scope=then, direction=kind)
    kit.train(model, optimizer, range(3))
    state = kit.through_file(optimizer.state_dict())
    other = kit.guide(twin, kit.adamw, scope=now, direction=kind)
    caught = warnings_of_loading(other, state)
    if then == now:
        assert not caught
        kit.assert_same(other.state_dict(), state)
        return
    assert_direction_dropped(other, caught)
    assert "dropped: other parameters share a scope" in str(caught[0].message)


@pytest.mark.parametrize(("kind", "said"), [("on update", "1 source,"), ("two sources", "2 sources,")])
def test_i03_a_state_of_a_run_with_sources_warns_where_they_are_not_given_again(kind: str, said: str) -> None:
    """Nothing told that the rest of the run would forget what the sources hold."""
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind)
    kit.train(model, optimizer, range(2))
    state = kit.through_file(optimizer.state_dict())
    assert not warnings_of_loading(kit.guide(kit.net(), kit.adamw, kind), state)
    plain = kit.guide(kit.net(), kit.adamw)
    (caught,) = warnings_of_loading(plain, state)
    assert caught.filename == __file__
    assert f"saved with {said} and this optimizer has none" in str(caught.message)
    assert plain.metrics()["steps"] == 2
    assert not warnings_of_loading(kit.guide(kit.net(), kit.adamw), plain.state_dict())


def test_i21_scopes_that_are_alike_under_another_name_keep_the_direction() -> None:
    model, twin = kit.net(), kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(3))
    other = kit.guide(twin, kit.adamw, scope=dict.fromkeys(twin.parameters(), "all"))  # type: ignore[arg-type]
    other.load_state_dict(optimizer.state_dict())
    kit.assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_i14_direction_of_low_precision_parameters_is_float32_after_loading(dtype: torch.dtype) -> None:
    model = kit.net(dtype=dtype)
    optimizer = GradGuide(kit.adamw(model.parameters(), lr=1e-3), direction=Direction())
    for step in range(3):
        kit.give_gradients(model, step)
        optimizer.step()
    before = kit.directions_of(optimizer)
    assert len(before) == 4
    assert {d.dtype for d in before.values()} == {torch.float32}
    twin = kit.net(dtype=dtype)
    other = GradGuide(kit.adamw(twin.parameters(), lr=1e-3), direction=Direction())
    other.load_state_dict(kit.through_file(optimizer.state_dict()))
    kit.assert_same(kit.directions_of(other), before)
    assert any(not torch.equal(d, d.to(dtype).float()) for d in before.values()), "the values fit the lower precision"


def test_counters_on_another_device_are_brought_to_the_host() -> None:
    """On CUDA, totals are on the device after the first step. Fake tensors simulate a missing device."""
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        totals = torch.zeros(2, dtype=torch.float64, device="cuda")
        state = checkpoint.merge(optimizer.base.state_dict(), optimizer.base, optimizer._engine, totals)
    assert {entry[COUNTERS].device.type for entry in state["state"].values()} == {"cpu"}
