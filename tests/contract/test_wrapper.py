"""GradGuide as an optimizer: forwarded attributes, copies, wrappers (rows 1, 4, 5, 6, 8, 20, 22)."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gradguide import Direction, GradGuide, guided, unwrap
from tests.contract import kit

Held = tuple[nn.Sequential, GradGuide]


def by_pickle(held: Held) -> Held:
    loaded: Held = pickle.loads(pickle.dumps(held))
    return loaded


def by_torch_save(held: Held) -> Held:
    buffer = io.BytesIO()
    torch.save(held, buffer)
    buffer.seek(0)
    loaded: Held = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[Held], Held]] = {
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
    "torch.save": by_torch_save,
}


def assert_forwarded(optimizer: GradGuide) -> None:
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults is optimizer.base.defaults


def test_i01_is_an_optimizer_in_every_sense() -> None:
    optimizer = kit.guide(kit.net(), kit.adamw)
    assert isinstance(optimizer, Optimizer)
    assert issubclass(GradGuide, Optimizer)
    plain = kit.adamw(kit.net().parameters())
    hooks = [name for name in vars(plain) if name.endswith("_hooks")]
    assert len(hooks) >= 6
    for name in hooks:
        assert vars(optimizer)[name] == {}, name
    assert type(optimizer).step.hooked  # type: ignore[attr-defined]


def test_i04_groups_state_and_defaults_are_the_bases_after_everything() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, "on update")
    assert_forwarded(optimizer)
    kit.train(model, optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_forwarded(optimizer)
    optimizer.add_param_group({"params": (p for p in [nn.Parameter(torch.ones(2))]), "lr": 0.5})
    assert_forwarded(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3, 1]
    assert optimizer.base.param_groups[2]["lr"] == 0.5

    groups, state, defaults = list(optimizer.param_groups), optimizer.state.copy(), dict(optimizer.defaults)
    optimizer.param_groups, optimizer.state, optimizer.defaults = groups, state, defaults
    assert_forwarded(optimizer)
    assert optimizer.base.param_groups is groups
    assert optimizer.base.state is state
    assert optimizer.base.defaults is defaults


def test_i04_scheduler_drives_the_groups_that_are_stepped_after_a_load() -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.sgd)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
    kit.train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    before = kit.parameters_of(model)
    kit.train(model, optimizer, range(1, 3))
    kit.assert_same(kit.parameters_of(model), before)


def test_i04_groups_swapped_after_construction_are_the_ones_stepped() -> None:
    model, twin = kit.net(), kit.net()
    optimizer = GradGuide(kit.sgd(model.parameters()), direction=Direction())
    optimizer.param_groups[0]["params"] = list(twin.parameters())  # what FSDP2 does (row 8)
    before = kit.parameters_of(twin)
    kit.train(twin, optimizer, range(2))
    assert kit.differ(kit.parameters_of(twin), before)
    assert set(kit.directions_of(optimizer)) == set(range(4))
    kit.assert_same(kit.parameters_of(model), before)


@pytest.mark.parametrize("scope", ["global", "module"])
def test_i08_source_and_scopes_follow_parameters_that_are_swapped_in(scope: str) -> None:
    """FSDP2 replaces the parameters after construction. The run must be the same."""
    model, twin, plain = kit.net(), kit.net(), kit.net()
    optimizer, other = (kit.guide(m, kit.adamw, "on update", scope) for m in (model, plain))
    swapped = iter(twin.parameters())
    for group in optimizer.param_groups:
        group["params"] = [next(swapped) for _ in group["params"]]
    kit.train(twin, optimizer, range(4))
    kit.train(plain, other, range(4))
    assert other.metrics()["source_cosine"] != 0
    kit.assert_same(kit.snapshot(twin, optimizer), kit.snapshot(plain, other))
    kit.assert_same(optimizer.metrics(), other.metrics())


@pytest.mark.parametrize("kind", kit.KINDS)
def test_i06_base_state_holds_only_the_bases_keys(kind: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind)
    kit.train(model, optimizer, range(3))
    assert len(optimizer.base.state) == 4
    for entry in optimizer.base.state.values():
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}


def test_i06_parameter_without_gradient_until_after_a_load_starts_late() -> None:
    model = kit.net()
    late = list(model.parameters())[3]
    late.requires_grad_(False)
    optimizer = kit.guide(model, kit.adamw)
    kit.train(model, optimizer, range(2))
    assert late not in optimizer.base.state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert late not in optimizer.base.state
    late.requires_grad_(True)
    before = late.detach().clone()
    kit.train(model, optimizer, range(2, 4))
    assert not torch.equal(late, before)
    assert optimizer.base.state[late]["step"] == 2


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", kit.KINDS)
def test_i20_copies_continue_as_the_original_would(way: str, kind: str) -> None:
    model = kit.net()
    optimizer = kit.guide(model, kit.adamw, kind, "module")
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # patches step on the instance, which a copy must not have
    kit.train(model, optimizer, range(3))
    kept = kit.snapshot(model, optimizer)

    other_model, other = COPIES[way]((model, optimizer))
    assert_forwarded(other)
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine for group in other.param_groups for p in group["params"])
    kit.train(other_model, other, range(3, 6))
    kit.assert_same(kit.snapshot(model, optimizer), kept)

    kit.train(model, optimizer, range(3, 6))
    kit.assert_same(kit.snapshot(other_model, other), kit.snapshot(model, optimizer))


def test_i20_unknown_attribute_is_an_attribute_error_even_half_built() -> None:
    bare = GradGuide.__new__(GradGuide)
    for name in ("nonsense", "__deepcopy__", "_engine", "base"):
        assert not hasattr(bare, name)
    whole = kit.guide(kit.net(), kit.adamw)
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(whole, "nonsense")  # noqa: B009


def test_i22_hasattr_is_truthful() -> None:
    optimizer = kit.guide(kit.net(), kit.adamw)
    for name in ("train", "eval", "_step_supports_amp_scaling", "optimizer"):
        assert not hasattr(optimizer, name), name
        with pytest.raises(AttributeError):
            getattr(optimizer, name)


class Clearing(torch.optim.AdamW):
    """A base whose ``zero_grad`` takes no argument, as FusedAdam of apex and DeepSpeed."""

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_i22_gradients_are_cleared_by_a_base_whose_zero_grad_takes_no_argument(set_to_none: bool) -> None:
    model = kit.net()
    optimizer = GradGuide(Clearing(model.parameters(), lr=0.1))
    kit.give_gradients(model, 0)
    optimizer.zero_grad(set_to_none)
    assert all(p.grad is None for p in model.parameters())


def test_i22_the_signature_of_a_bases_zero_grad_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(torch.optim.AdamW):
        def zero_grad(self, set_to_none: bool = True) -> None:
            cleared.append(set_to_none)

    cleared: list[bool] = []
    optimizer = GradGuide(Counting(kit.net().parameters(), lr=0.1))
    optimizer.zero_grad()
    monkeypatch.setattr(inspect, "signature", None)
    optimizer.zero_grad(set_to_none=False)
    assert cleared == [True, False]


def test_i22_a_zero_grad_that_is_set_on_the_base_itself_is_called() -> None:
    optimizer, cleared = kit.guide(kit.net(), kit.adamw), []
    for replaced in (lambda: cleared.append("none"), lambda set_to_none: cleared.append(set_to_none)):
        optimizer.base.zero_grad = replaced  # type: ignore[method-assign, assignment]
        optimizer.zero_grad()
    assert cleared == ["none", True]


def test_i22_unwrap_finds_gradguide_at_any_depth() -> None:
    class Wrapper:
        def __init__(self, optimizer: object) -> None:
            self.optimizer = optimizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.optimizer, name)

    optimizer = kit.guide(kit.net(), kit.adamw)
    assert unwrap(optimizer) is optimizer
    assert unwrap(Wrapper(Wrapper(optimizer))) is optimizer
    assert unwrap(Wrapper(optimizer.base)) is None
    assert unwrap(None) is None
    circle = Wrapper(None)
    circle.optimizer = circle
    assert unwrap(circle) is None


def test_i05_guided_builds_what_gradguide_over_the_base_is() -> None:
    direct, built = kit.net(), kit.net()
    one = GradGuide(kit.adamw(direct.parameters(), weight_decay=0.1), nonfinite="raise", direction=Direction())
    other = guided(torch.optim.AdamW, nonfinite="raise", direction=Direction())(
        built.parameters(), lr=1e-2, weight_decay=0.1
    )
    assert isinstance(other, GradGuide)
    assert unwrap(other) is other
    kit.train(direct, one, range(3))
    kit.train(built, other, range(3))
    kit.assert_same(kit.snapshot(built, other), kit.snapshot(direct, one))
    for copied in (way((built, other)) for way in COPIES.values()):
        kit.assert_same(kit.snapshot(*copied)["state"], other.state_dict())
    with pytest.raises(TypeError, match=r"SGD.*GradGuide"):
        guided(kit.sgd(direct.parameters()))  # type: ignore[arg-type]


def test_i05_guided_looks_like_an_optimizer_class() -> None:
    """Trainer treats anything that is not a subclass of Optimizer as a factory, with other arguments."""
    made: Any = guided(torch.optim.AdamW)
    assert isinstance(made, type)
    assert issubclass(made, Optimizer)
    assert "AdamW" in made.__name__
