"""Compare the fused step with the unfused step over torch's Adam and AdamW."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from gradguide import Alignment, Direction, GradGuide, History, Magnitude, SourceGradient
from gradguide.step import fused_adam as fused
from gradguide.step import nonfinite as finite
from tests.contract import kit
from tests.ops.triton.problems import DEVICE

SHAPES: tuple[tuple[int, ...], ...] = ((5, 7), (), (40, 13), (0,))


@pytest.fixture(autouse=True)
def fused_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the number of launches of each fused step, so that tests can check that the step was fused."""
    launches: list[int] = []
    original = fused.step

    def counted(parts: Any, *rest: Any) -> list[Tensor]:
        launches.append(len(parts))
        return original(parts, *rest)

    monkeypatch.setattr(fused, "step", counted)
    yield launches


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for shape in SHAPES]


def give_gradients(held: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in held:
        drawn = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.grad = torch.empty_like(parameter).copy_(drawn)  # with the strides of the parameter, as in autograd


def source_of(held: list[nn.Parameter], moving: bool, seed: int = 7) -> SourceGradient:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, Tensor]:
        return {f"p{i}": torch.randn(p.shape, generator=generator).to(DEVICE) for i, p in enumerate(held)}

    if not moving:
        return SourceGradient(draw())
    return SourceGradient(draw(), fisher={k: t.abs() for k, t in draw().items()}, anchor=draw())


Make = Callable[..., Optimizer]


def guided(
    backend: str,
    make: Make,
    dtype: torch.dtype = torch.float32,
    source: bool | None = None,
    on: str = "gradient",
    sources: int = 1,
    **options: Any,
) -> tuple[list[nn.Parameter], GradGuide]:
    """Build two param groups; ``source`` is whether sources move, None for no sources; ``on`` is that of Alignment."""
    held = parameters(dtype)
    if source is not None:
        given = [source_of(held, source, seed) for seed in range(7, 7 + sources)]
        options["alignment"] = Alignment(given, on=on, weight=0.1)
        options["names"] = [(f"p{i}", p) for i, p in enumerate(held)]
    options.setdefault("direction", Direction())
    options.setdefault("magnitude", Magnitude(max_update=None))
    base = make([{"params": held[:2]}, {"params": held[2:], "lr": 0.03, "weight_decay": 0.1}])
    return held, GradGuide(base, backend=backend, **options)


def run(held: list[nn.Parameter], optimizer: GradGuide, steps: range) -> None:
    for step in steps:
        give_gradients(held, step)
        optimizer.step()


def assert_close(found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for (mine, one), (theirs, other) in zip([found], [wanted], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
        for p, q in zip(mine, theirs, strict=True):
            assert one.state[p].keys() == other.state[q].keys()
            for key, value in other.state[q].items():
                assert one.state[p][key].dtype == value.dtype
                torch.testing.assert_close(one.state[p][key], value, rtol=rtol, atol=atol)
    torch.testing.assert_close(kit.directions_of(found[1]), kit.directions_of(wanted[1]), rtol=rtol, atol=atol)


def made(kind: type[Adam], **options: Any) -> Make:
    return lambda params: kind(params, **({"lr": 0.01, "fused": True} | options))


BASES = {
    "AdamW": made(AdamW),
    "AdamW maximize": made(AdamW, maximize=True),
    "AdamW capturable": made(AdamW, capturable=True),
    "AdamW betas": made(AdamW, betas=(0.0, 0.5), eps=1e-3),
    "Adam": made(Adam),
    "Adam decay": made(Adam, weight_decay=0.2, maximize=True),
}

BOUNDED = Magnitude(max_update=1e-3)

RULES: dict[str, dict[str, Any]] = {
    "unbounded": {},
    "direction": {"magnitude": None},
    "magnitude": {"direction": None},
    "shared momentum": {"direction": Direction(share_momentum=True)},
    "source": {"source": False, "magnitude": Magnitude(max_norm=2.0, max_update=None)},
    "moving source, by group": {"source": True, "scope": "group"},
    "by tensor": {"scope": "tensor"},
    "bounded": {"magnitude": BOUNDED},
    "bounded, no direction, by tensor": {"magnitude": BOUNDED, "direction": None, "scope": "tensor"},
    "source on the update": {"source": False, "on": "update", "magnitude": None},
    "moving source on the update, bounded, by group": {
        "source": True, "on": "update", "scope": "group", "magnitude": BOUNDED,
    },
    "three sources on the update, bounded, by tensor": {
        "source": False, "on": "update", "sources": 3, "scope": "tensor", "magnitude": BOUNDED,
    },
    "three sources on the update, bounded": {"source": False, "on": "update", "sources": 3, "magnitude": BOUNDED},
}  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        *(("unbounded", name) for name in BASES),
        *(("shared momentum", name) for name in ("AdamW maximize", "AdamW betas")),
    ],
)
def test_every_base_steps_as_by_itself(name: str, rules: str, fused_steps: list[int]) -> None:
    mine, other = (guided(backend, BASES[name], **RULES[rules]) for backend in ("triton", "foreach"))
    run(*mine, range(3))
    assert fused_steps == [1] * 3
    run(*other, range(3))
    assert len(fused_steps) == 3
    assert_close(mine, other)


@pytest.mark.parametrize("rules", RULES)
def test_every_rule_acts_as_in_a_step_of_its_own(rules: str, fused_steps: list[int]) -> None:
    mine, other = (guided(backend, BASES["AdamW"], **RULES[rules]) for backend in ("triton", "foreach"))
    run(*mine, range(3))
    run(*other, range(3))
    assert len(fused_steps) == 3
    assert_close(mine, other)
    found, wanted = mine[1].metrics(), other[1].metrics()
    if wanted["update_norm"] != wanted["update_norm"]:  # NaN
        wanted["update_norm"] = found["update_norm"]  # the unfused step does not measure it here
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True)


def test_a_bound_on_the_update_holds() -> None:
    held, optimizer = guided("triton", BASES["AdamW"], magnitude=BOUNDED)
    before = kit.parameters_of(nn.ParameterList(held))
    run(held, optimizer, range(1))
    moved = flat(held) - flat(before)
    assert float(moved.norm() / flat(before).norm()) == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("sources", [1, 3])
def test_an_update_conflicts_with_no_source(sources: int, fused_steps: list[int]) -> None:
    """Check the final update. Without the rule it conflicts with some of these sources."""
    assert furthest_along_a_source("update", sources) < 1e-6
    assert furthest_along_a_source(None, sources) > 1e-3
    assert len(fused_steps) == 8


def furthest_along_a_source(on: str | None, sources: int) -> float:
    """Return the largest cosine of an update with a source over four steps; above 0 the source loss rises."""
    options: dict[str, Any] = {} if on is None else {"source": False, "on": on, "sources": sources}
    held, optimizer = guided("triton", BASES["AdamW"], magnitude=None, **options)
    names = [f"p{i}" for i in range(len(held))]
    given = [source_of(held, False, seed).row(names, held) for seed in range(7, 7 + sources)]
    against = [flat([row.value(i, torch.float32) for i in range(len(held))]) for row in given]
    cosines = []
    for step in range(4):
        before = flat(held)
        run(held, optimizer, range(step, step + 1))
        cosines += [float(torch.cosine_similarity(flat(held) - before, source, dim=0)) for source in against]
    return max(cosines)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements as one float64 vector."""
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def test_update_norm_is_the_length_of_the_update() -> None:
    held, optimizer = guided("triton", BASES["AdamW"])
    before = [p.detach().clone() for p in held]
    run(held, optimizer, range(1))
    squares = [(p.detach() - b).double().square().sum() for p, b in zip(held, before, strict=True)]
    assert optimizer.metrics()["update_norm"] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-5)


def test_low_precision_parameters(fused_steps: list[int]) -> None:
    mine, other = (guided(backend, BASES["AdamW"], torch.bfloat16) for backend in ("triton", "foreach"))
    run(*mine, range(3))
    run(*other, range(3))
    assert len(fused_steps) == 3
    assert_close(mine, other, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_learning_rate_may_be_a_tensor_that_changes(groups: int, fused_steps: list[int]) -> None:
    results = []
    for backend in ("triton", "foreach"):
        rates = [torch.tensor(0.01 * (1 + group), device=DEVICE) for group in range(groups)]
        held = parameters()
        base = AdamW([{"params": held[group::groups], "lr": rate} for group, rate in enumerate(rates)], fused=True)
        optimizer = GradGuide(base, magnitude=None, backend=backend, direction=Direction())
        run(held, optimizer, range(1))
        torch._foreach_mul_(rates, 3.0)
        run(held, optimizer, range(1, 3))
        results.append((held, optimizer))
    assert fused_steps == [1, 1, 1]
    assert_close(results[0], results[1])


@pytest.mark.parametrize(("groups", "launches"), [(fused.MAX_SETTINGS, [1]), (fused.MAX_SETTINGS + 1, [])])
def test_param_groups_are_stepped_together(groups: int, launches: list[int], fused_steps: list[int]) -> None:
    """A launch supports up to MAX_SETTINGS different settings; with more, the base steps."""
    results = []
    for backend in ("triton", "foreach"):
        held = [nn.Parameter(torch.linspace(-1.0, 1.0, 3 + i % 5, device=DEVICE)) for i in range(2 * groups)]
        # The second half repeats the settings of the first, so they count once.
        base = AdamW([{"params": [p], "lr": 0.01 * (1 + i % groups)} for i, p in enumerate(held)], fused=True)
        results.append((held, GradGuide(base, magnitude=None, backend=backend, direction=Direction())))
        run(*results[-1], range(1))
    assert fused_steps == launches
    assert_close(results[0], results[1])


@pytest.mark.parametrize("rules", ["source", "shared momentum", "source on the update", "bounded"])
@pytest.mark.parametrize("up", [(True, True), (False, True)], ids=["one sign", "both signs"])
def test_i28_groups_that_maximize_are_descent(up: tuple[bool, bool], rules: str, fused_steps: list[int]) -> None:
    """Test one launch per sign, compared with the same problem as descent on the portable backend."""
    results = []
    for stated in (False, True):
        signs = [-1.0 if climbs and not stated else 1.0 for climbs in up for _ in range(2)]

        def make(groups: Any, stated: bool = stated) -> Optimizer:
            signed: list[dict[str, Any]] = [
                {**group, "maximize": climbs and not stated} for group, climbs in zip(groups, up, strict=True)
            ]
            return AdamW(signed, lr=0.01, fused=True)

        held, optimizer = guided("foreach" if stated else "triton", make, **RULES[rules])
        for step in range(3):
            give_gradients(held, step)
            for parameter, sign in zip(held, signs, strict=True):
                assert parameter.grad is not None
                parameter.grad *= sign
            optimizer.step()
        results.append(([p.detach() for p in held], optimizer.metrics()))
    assert fused_steps == [len(set(up))] * 3
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for key in ("grad_norm", "guided_norm", "clip_factor", "source_cosine", "conflict", "direction_cosine"):
        assert results[0][1][key] == pytest.approx(results[1][1][key], rel=1e-4, abs=1e-6, nan_ok=True)


def test_groups_that_differ_in_kind_are_the_bases(fused_steps: list[int]) -> None:
    results = []
    for backend in ("triton", "foreach"):
        held = parameters()
        rate = torch.tensor(0.01, device=DEVICE)
        groups: list[dict[str, Any]] = [{"params": held[:2]}, {"params": held[2:], "lr": rate}]
        base = AdamW(groups, lr=0.01, fused=True)
        results.append((held, GradGuide(base, magnitude=None, backend=backend, direction=Direction())))
        run(*results[-1], range(2))
    assert fused_steps == []
    assert_close(results[0], results[1])


def test_the_gradient_stays_as_received() -> None:
    held, optimizer = guided("triton", BASES["AdamW"], magnitude=Magnitude(max_norm=1e-3, max_update=None))
    give_gradients(held, 0)
    before = [p.grad.clone() for p in held if p.grad is not None]
    optimizer.step()
    assert optimizer.metrics()["clip_factor"] < 1.0
    kit.assert_same([p.grad for p in held], before)


def test_a_gradient_that_is_not_finite(monkeypatch: pytest.MonkeyPatch, fused_steps: list[int]) -> None:
    monkeypatch.setattr(finite, "uses_found_inf", lambda measured, base, policy: True)  # as on CUDA
    held, optimizer = guided("triton", BASES["AdamW"])
    run(held, optimizer, range(2))
    before = copy.deepcopy(
        [[p.detach() for p in held], [optimizer.state[p] for p in held], kit.directions_of(optimizer)]
    )
    give_gradients(held, 2)
    assert held[0].grad is not None
    held[0].grad[1, 1] = float("nan")
    optimizer.step()
    assert len(fused_steps) == 3
    after = [[p.detach() for p in held], [optimizer.state[p] for p in held], kit.directions_of(optimizer)]
    kit.assert_same(after, before)
    assert optimizer.metrics()["skipped"] == 1
    assert optimizer.metrics()["update_norm"] == 0.0


def test_fused_can_be_switched_off_and_on_within_a_run(fused_steps: list[int]) -> None:
    mine, other = (guided(backend, BASES["AdamW"]) for backend in ("triton", "foreach"))
    for step in range(6):
        for group in mine[1].param_groups:
            group["fused"] = step % 3 != 1
        run(*mine, range(step, step + 1))
    run(*other, range(6))
    assert len(fused_steps) == 4
    assert_close(mine, other)


def test_moments_that_are_cast_in_place_are_read_as_what_they_are(fused_steps: list[int]) -> None:
    runs = []
    for in_place in (False, True):
        held, optimizer = guided("triton", BASES["AdamW"])
        run(held, optimizer, range(2))
        for state in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                if in_place:
                    state[name].data = state[name].data.bfloat16()
                else:
                    state[name] = state[name].bfloat16()
        run(held, optimizer, range(2, 4))
        runs.append(held)
    assert fused_steps == [1] * 8
    assert all(map(torch.equal, *runs))


def test_moments_that_are_forgotten_begin_anew(fused_steps: list[int]) -> None:
    runs = [guided(backend, BASES["AdamW"]) for backend in ("triton", "foreach")]
    for held, optimizer in runs:
        run(held, optimizer, range(2))
        optimizer.state.clear()
        run(held, optimizer, range(2, 4))
    assert fused_steps == [1] * 4
    assert_close(runs[0], runs[1])


def test_a_checkpoint_is_that_of_the_base(fused_steps: list[int]) -> None:
    held, optimizer = guided("triton", BASES["AdamW"])
    run(held, optimizer, range(2))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, other = guided("triton", BASES["AdamW"])
    for p, q in zip(twin, held, strict=True):
        p.data.copy_(q.data)
    other.load_state_dict(copy.deepcopy(saved))  # load_state_dict does not copy the tensors
    run(held, optimizer, range(2, 4))
    run(twin, other, range(2, 4))
    kit.assert_same([p.detach() for p in twin], [p.detach() for p in held])
    # Plain AdamW loads the same file.
    plain = AdamW([{"params": held[:2]}, {"params": held[2:]}], lr=0.01, fused=True)
    plain.load_state_dict(saved)
    assert float(plain.state[held[0]]["step"]) == 2.0


def test_a_state_made_by_the_fused_step_is_as_the_base_makes_it() -> None:
    mine, other = (guided(backend, BASES["AdamW"]) for backend in ("triton", "foreach"))
    run(*mine, range(1))
    run(*other, range(1))
    for p, q in zip(mine[0], other[0], strict=True):
        found, wanted = mine[1].state[p], other[1].state[q]
        assert list(found) == list(wanted)
        for key in wanted:
            assert found[key].dtype == wanted[key].dtype
            assert found[key].device == wanted[key].device
            assert found[key].shape == wanted[key].shape


def test_a_history_is_recorded() -> None:
    held, optimizer = guided("triton", BASES["AdamW"])
    history = History()
    optimizer.record(history)
    run(held, optimizer, range(2))
    assert len(history) == 2


def hook_post(base: Optimizer) -> None:
    base.register_step_post_hook(lambda *_: None)


def hook_pre(base: Optimizer) -> None:
    base.register_step_pre_hook(lambda *_: None)


def schedule(base: Optimizer) -> None:
    torch.optim.lr_scheduler.StepLR(base, 1)


def amsgrad(base: Optimizer) -> None:
    for group in base.param_groups:
        group["amsgrad"] = True


def tensor_beta(base: Optimizer) -> None:
    base.param_groups[1]["weight_decay"] = torch.tensor(0.1, device=DEVICE)


def one_group_not_fused(base: Optimizer) -> None:
    base.param_groups[1]["fused"] = False


@pytest.mark.parametrize("change", [hook_post, hook_pre, schedule, amsgrad, tensor_beta, one_group_not_fused])
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_the_base_steps_by_itself_where_that_would_be_noticed(
    change: Callable[[Optimizer], None], fused_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdamW, "step", lambda self: None)  # some of these changes would make the real step fail
    held, optimizer = guided("triton", BASES["AdamW"])
    run(held, optimizer, range(1))
    assert len(fused_steps) == 1
    change(optimizer.base)
    run(held, optimizer, range(1, 2))
    assert len(fused_steps) == 1


class Subclass(AdamW):
    pass


@pytest.mark.parametrize("kind", ["subclass", "SGD", "not contiguous", "foreach", "many sources"])
def test_other_steps_are_the_bases(kind: str, fused_steps: list[int]) -> None:
    make: Make = made(Subclass) if kind == "subclass" else BASES["AdamW"]
    if kind == "SGD":
        make = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    many: dict[str, Any] = {"source": True, "on": "update", "sources": fused.MAX_SOURCES + 1}
    options = many if kind == "many sources" else {}
    held, optimizer = guided("foreach" if kind == "foreach" else "triton", make, **options)
    if kind == "not contiguous":
        held[0].data = held[0].data.T.contiguous().T
    before = kit.parameters_of(nn.ParameterList(held))
    run(held, optimizer, range(1))
    assert fused_steps == []
    assert kit.differ(kit.parameters_of(nn.ParameterList(held)), before)
