"""State dicts: one from the same optimizer loads, a damaged one changes nothing (rows 21, 33)."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from gradguide import Direction, GradGuide
from gradguide.checkpoint import entries
from gradguide.checkpoint.entries import COUNTERS, DIRECTION
from gradguide.rules import decide
from gradguide.step import scope_state
from tests.conformance.bases import BASES, net_for
from tests.contract import kit
from tests.contract.shaped import SHAPED
from tests.contract.states import State, set_to

nan, inf = float("nan"), float("inf")
ALL = BASES | SHAPED


@pytest.mark.parametrize("shared", [False, True], ids=["own direction", "no direction"])
@pytest.mark.parametrize("base", ALL)
def test_i33_a_state_of_its_own_loads_and_the_run_goes_on(base: str, shared: bool) -> None:
    model, twin = net_for(base), net_for(base)
    optimizer, other = (
        GradGuide(ALL[base](list(m.parameters())), direction=None if shared else Direction()) for m in (model, twin)
    )
    kit.train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    kit.assert_same(other.state_dict(), optimizer.state_dict())
    kit.train(model, optimizer, range(3, 6))
    kit.train(twin, other, range(3, 6))
    kit.assert_same(kit.snapshot(twin, other), kit.snapshot(model, optimizer))
    assert other.metrics()["steps"] == 6


def test_i33_a_base_whose_state_dict_has_another_form_is_named_when_it_is_saved() -> None:
    class Outer(torch.optim.SGD):
        def state_dict(self) -> State:
            return {"inner": super().state_dict(), "alpha": 0.5}

    optimizer = GradGuide(Outer(kit.net().parameters()), direction=Direction())
    with pytest.raises(TypeError, match=r"Outer\.state_dict.*found \['alpha', 'inner'\].*wrap the GradGuide"):
        optimizer.state_dict()


@pytest.mark.parametrize("base", [name for name in BASES if name not in ("Lion", "SGD", "Adafactor")])
def test_i21_of_torchs_own_optimizers_every_tensor_shaped_as_the_parameter_is_checked(base: str) -> None:
    model = net_for(base)
    optimizer = GradGuide(BASES[base](list(model.parameters())), direction=Direction())
    kit.train(model, optimizer, range(2))
    parameter = next(model.parameters())
    state = optimizer.state_dict()
    alike = [k for k, v in state["state"][0].items() if isinstance(v, Tensor) and v.shape == parameter.shape]
    assert len(alike) >= 2
    before = kit.snapshot(model, optimizer)
    for key in alike:
        damaged = copy.deepcopy(state)
        damaged["state"][0][key] = torch.ones(2, 3)
        with pytest.raises(ValueError, match=rf"saved {re.escape(key)} of parameter number 0 has shape \(2, 3\)"):
            optimizer.load_state_dict(damaged)
        kit.assert_same(kit.snapshot(model, optimizer), before)


def guide(model: nn.Module) -> GradGuide:
    return GradGuide(kit.adamw(list(model.named_parameters())), direction=Direction())


def trained() -> tuple[nn.Sequential, GradGuide]:
    model = kit.net()
    optimizer = guide(model)
    kit.train(model, optimizer, range(3))
    return model, optimizer


def fake(like: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.zeros(like.shape)


# Each: replacement of a direction, and pattern of the message.
DIRECTIONS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "text": (lambda d: "text", "must be a tensor, found str"),
    "none": (lambda d: None, "must be a tensor, found NoneType"),
    "list": (lambda d: d.tolist(), "must be a tensor, found list"),
    "sparse": (lambda d: d.to_sparse(), "found layout torch.sparse_coo"),
    "compressed": (lambda d: d.to_sparse_csr(), "found layout torch.sparse_csr"),
    "nested": (lambda d: torch.nested.nested_tensor(list(d)), "nested tensor"),
    "meta": (lambda d: d.to("meta"), "meta device"),
    "fake": (fake, "cannot be read"),
    "quantised": (lambda d: torch.quantize_per_tensor(d, 0.1, 0, torch.qint8), "found dtype torch.qint8"),
    "complex": (lambda d: d.to(torch.complex64), "found dtype torch.complex64"),
    "integer": (lambda d: d.long(), "found dtype torch.int64"),
    "bool": (lambda d: d.bool(), "found dtype torch.bool"),
    "short": (lambda d: d[:1], r"has shape \(1, 4\), the parameter \(6, 4\)"),
    "scalar": (lambda d: d.mean(), r"has shape \(\), the parameter \(6, 4\)"),
    "transposed": (lambda d: d.T, r"has shape \(4, 6\)"),
    "empty": (lambda d: d[:0], r"has shape \(0, 4\)"),
    "nan": (set_to(3, nan), "NaN or infinite"),
    "inf": (set_to(-1, -inf), "NaN or infinite"),
    "too large for float32": (lambda d: set_to(0, 1e300)(d.double()), "NaN or infinite"),
}
COUNTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "text": (lambda c: "text", "must be a tensor, found str"),
    "none": (lambda c: None, "must be a tensor, found NoneType"),
    "number": (lambda c: 1.0, "must be a tensor, found float"),
    "list": (lambda c: c.tolist(), "must be a tensor, found list"),
    "sparse": (lambda c: c.to_sparse(), "found layout torch.sparse_coo"),
    "meta": (lambda c: c.to("meta"), "meta device"),
    "fake": (fake, "cannot be read"),
    "integer": (lambda c: c.long(), "found dtype torch.int64"),
    "complex": (lambda c: c.to(torch.complex128), "found dtype torch.complex128"),
    "empty": (lambda c: c[:0], "must hold 7 numbers"),
    "scalar": (lambda c: c[0], "must hold 7 numbers"),
    "matrix": (lambda c: c.reshape(1, 7), "must hold 7 numbers"),
    "short": (lambda c: c[:3], "must hold 7 numbers, found 3"),
    "long": (lambda c: torch.cat([c, c]), "must hold 7 numbers, found 14"),
    "format 0": (set_to(0, 0), "format of 1 or above, found 0"),
    "format -5": (set_to(0, -5), "format of 1 or above, found -5"),
    "format 1.5": (set_to(0, 1.5), "format of 1 or above, found 1.5"),
    "format nan": (set_to(0, nan), "format of 1 or above, found nan"),
    "format inf": (set_to(0, inf), "format of 1 or above, found inf"),
    "format 1 with the numbers of format 2": (set_to(0, 1), "must hold 8 numbers, found 7"),
    "format 3": (set_to(0, 3), "format 3, this version of gradguide reads up to 2: upgrade"),
    "steps": (set_to(1, -1), "count whole steps from 0, found -1"),
    "half a step": (set_to(1, 2.5), "count whole steps from 0, found 2.5"),
    "steps nan": (set_to(1, nan), "count whole steps from 0, found nan"),
    "steps of another": (set_to(1, 4), "count 4 steps, those of another parameter 3"),
    "skipped": (set_to(2, -3), "count whole skipped from 0, found -3"),
    "skipped inf": (set_to(2, inf), "count whole skipped from 0, found inf"),
    "skipped of another": (set_to(2, 1), "count 1 skipped, those of another parameter 0"),
    "mass nan": (set_to(3, nan), "mass .* 0 or above, found nan"),
    "mass negative": (set_to(3, -0.5), "mass .* 0 or above, found -0.5"),
    "mass inf": (set_to(3, inf), "mass .* 0 or above, found inf"),
    "square nan": (set_to(4, nan), "square .* 0 or above, found nan"),
    "square negative": (set_to(4, -1e-9), "square .* 0 or above, found -1e-09"),
    "sources negative": (set_to(5, -1), "sources .* 0 or above, found -1"),
    "scope nan": (set_to(6, nan), "scope .* 0 or above, found nan"),
}
CASES = [(DIRECTION, *case) for case in DIRECTIONS.values()] + [(COUNTERS, *case) for case in COUNTS.values()]
IDS = [f"direction {name}" for name in DIRECTIONS] + [f"counters {name}" for name in COUNTS]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(("key", "damage", "said"), CASES, ids=IDS)
def test_i21_damage_of_an_own_entry_is_refused_by_name_and_changes_nothing(
    key: str, damage: Callable[[Tensor], object], said: str
) -> None:
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    kit.train(model, optimizer, range(3, 4))
    position = 0 if key == DIRECTION else 2
    state["state"][position][key] = damage(state["state"][position][key])
    state["param_groups"][0]["lr"] = 123.0
    before, groups = kit.snapshot(model, optimizer), optimizer.param_groups
    with pytest.raises(ValueError, match=said) as caught:
        optimizer.load_state_dict(state)
    assert key in str(caught.value) or "format 3" in str(caught.value)
    assert f"parameter {position}.weight" in str(caught.value) or "format 3" in str(caught.value)
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert optimizer.param_groups is groups


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: s["state"][1].update({"gradguide.trust": torch.ones(1)}), r"gradguide\.trust of .*0\.bias.*upgrade"),
        (lambda s: s["state"][1].pop(COUNTERS), r"direction of parameter 0\.bias comes without gradguide\.counters"),
        (lambda s: s["state"].update({"else": {COUNTERS: torch.ones(5)}}), r"belongs to no parameter"),
        (lambda s: s["state"].update({9: s["state"].pop(3)}), r"belongs to no parameter"),
        (lambda s: s["param_groups"][0].pop("params"), "not the state dict of an optimizer"),
        (lambda s: s["param_groups"][0].update(params=None), "not the state dict of an optimizer"),
        (lambda s: s["param_groups"][0].update(params=[[], 1, 2, 3]), "not the state dict of an optimizer"),
        (lambda s: s.update(param_groups=[None]), "not the state dict of an optimizer"),
        (lambda s: s.update(state=None), "not the state dict of an optimizer"),
        (lambda s: s.clear(), "not the state dict of an optimizer"),
        (lambda s: s["param_groups"].append({"params": []}), "2 param groups, the optimizer has 1"),
        (lambda s: s["param_groups"][0]["params"].pop(), "3 parameters in the state and 4"),
    ],
)
def test_i21_keys_that_are_missing_or_unknown_are_refused(damage: Callable[[State], object], said: str) -> None:
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    kit.train(model, optimizer, range(3, 4))
    damage(state)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(state)
    kit.assert_same(kit.snapshot(model, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_i33_a_direction_of_another_precision_or_layout_of_memory_loads(dtype: torch.dtype) -> None:
    _, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        direction = entry[DIRECTION].to(dtype)
        entry[DIRECTION] = direction.T.contiguous().T if direction.dim() == 2 else direction.repeat(2)[: len(direction)]
        entry[COUNTERS] = entry[COUNTERS].to(torch.float64)
    other = guide(kit.net())
    other.load_state_dict(state)
    found = kit.directions_of(other)
    assert {d.dtype for d in found.values()} == {torch.float32}
    kit.assert_same(found, {key: entry[DIRECTION].float() for key, entry in state["state"].items()})


def test_i33_a_new_statistic_is_zero_in_an_older_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever its name is in ``STATISTICS``, and without an effect on the other rules."""
    model, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    twin = kit.net()
    twin.load_state_dict(model.state_dict())
    kit.train(model, optimizer, range(3, 6))
    wanted = optimizer.state_dict()

    for module in (decide, scope_state, entries):
        monkeypatch.setattr(module, "STATISTICS", ("mass", "new", "square"))
    monkeypatch.setattr(entries, "_OLDER", {**entries._OLDER, entries.FORMAT: ("mass", "square", "sources", "scope")})
    monkeypatch.setattr(entries, "FORMAT", entries.FORMAT + 1)
    other = guide(twin)
    other.load_state_dict(state)
    kit.train(twin, other, range(3, 6))
    found = other.state_dict()
    for key, entry in found["state"].items():
        version, steps, skipped, mass, new, *rest = entry[COUNTERS].tolist()
        assert [version - 1, steps, skipped, mass, *rest] == wanted["state"][key][COUNTERS].tolist()
        assert new == 0
    kit.assert_same(twin.state_dict(), model.state_dict())
    for entry in found["state"].values():
        entry[COUNTERS][4] = 0.5
    other.load_state_dict(found)
    kit.assert_same(other.state_dict(), found)


def lose_step(state: State) -> None:
    del state["state"][2]["step"]


class Late(torch.optim.SGD):
    """Raises an error after loading."""

    def load_state_dict(self, state_dict: State) -> None:
        super().load_state_dict(state_dict)
        raise RuntimeError("too late")


@pytest.mark.parametrize("case", ["torch's own, half loaded", "at its end", "interrupted"])
def test_i21_a_base_that_fails_to_load_leaves_everything_as_it_was(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.net()
    base = kit.adamw(model.parameters()) if case.startswith("torch") else Late(model.parameters(), momentum=0.9)
    optimizer = GradGuide(base, direction=Direction())
    kit.train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    kit.train(model, optimizer, range(2, 4))
    before, held = kit.snapshot(model, optimizer), (base.state, base.param_groups)
    error: type[BaseException] = RuntimeError
    if case.startswith("torch"):
        lose_step(state)  # torch's loader fails after it replaced state and groups
        error = ValueError
    elif case == "interrupted":
        error = KeyboardInterrupt

        def interrupted(self: Optimizer, state: State) -> None:
            Optimizer.load_state_dict(self, state)
            raise KeyboardInterrupt

        monkeypatch.setattr(Late, "load_state_dict", interrupted)
    with pytest.raises(error, match="AdamW cannot load its part.*'step'" if error is ValueError else None):
        optimizer.load_state_dict(state)
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert (base.state, base.param_groups) == held
    kit.train(model, optimizer, range(4, 5))
