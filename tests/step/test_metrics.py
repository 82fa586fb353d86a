"""Compare the metrics of a step with a float64 computation on flat vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.step import nonfinite

KEYS = {
    "grad_norm",
    "guided_norm",
    "clip_factor",
    "direction_cosine",
    "coherence",
    "damping",
    "source_cosine",
    "conflict",
    "source_drift",
    "update_norm",
    "update_factor",
    "steps",
    "skipped",
}
SHAPES = {"first": (3, 2), "second": (4,)}
SIZES = [6, 4]
DECAY = 0.7


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }


def vectors(count: int, seed: int, drift: float = 0.0) -> list[Tensor]:
    """Return flat float64 vectors [10] with a common component."""
    generator = torch.Generator().manual_seed(seed)
    return [drift + torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(count)]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def table(vector: Tensor) -> dict[str, Tensor]:
    return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, vector.split(SIZES), strict=True)}


def set_gradient(known: dict[str, nn.Parameter], vector: Tensor) -> None:
    for name, part in table(vector).items():
        known[name].grad = part.clone()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm())) if a.any() and b.any() else 0.0


def fixed(vector: Tensor) -> SourceGradient:
    return SourceGradient(table(vector))


def same(found: dict[str, float], wanted: dict[str, float], rel: float = 1e-5) -> None:
    for key, value in wanted.items():
        if math.isnan(value):
            assert math.isnan(found[key]), key
        else:
            assert found[key] == pytest.approx(value, rel=rel, abs=1e-7), key


def test_before_the_first_step() -> None:
    found = GradGuide(SGD(parameters().values(), lr=0.1), direction=Direction()).metrics()
    assert found.keys() == KEYS
    assert found["steps"] == found["skipped"] == 0
    assert all(math.isnan(value) for key, value in found.items() if key not in ("steps", "skipped"))


def test_values_over_steps() -> None:
    """All features except damping: a moving source, pull, projection of the gradient, clipping."""
    known = parameters()
    s0, theta0 = vectors(2, seed=7)
    curve = vectors(1, seed=8)[0].abs()
    source = SourceGradient(table(s0), fisher=table(curve), anchor=table(theta0))
    weight, max_norm, rate = 0.5, 4.0, 0.1
    optimizer = GradGuide(
        SGD(known.values(), lr=rate),
        direction=Direction(decay=DECAY, damping=0.0),
        alignment=Alignment(source, on="gradient", weight=weight),
        magnitude=Magnitude(max_norm=max_norm, max_update=1e9),
        names=known.items(),
    )
    d = torch.zeros(10, dtype=torch.float64)
    seen = {"clipped": 0, "free": 0, "conflict": 0, "none": 0}
    for step, g in enumerate(vectors(12, seed=2, drift=0.3), 1):
        g = g * (0.2 if step % 3 == 0 else 1.0)
        before = flat(list(known.values()))
        s = s0 + curve * (before - theta0)
        guided = g + weight * s
        if guided @ s < 0:
            guided = guided - (guided @ s) / (s @ s) * s
        factor = min(1.0, max_norm / float(guided.norm()))
        ahead = DECAY * d + (1 - DECAY) * g / g.norm()
        coherence = float(ahead.norm()) / (1 - DECAY**step)
        set_gradient(known, g)
        optimizer.step()
        moved = flat(list(known.values())) - before
        update = -rate * factor * guided
        torch.testing.assert_close(moved, update, rtol=1e-5, atol=1e-8)
        conflict = cosine(g, s) < 0
        seen["clipped" if factor < 1 else "free"] += 1
        seen["conflict" if conflict else "none"] += 1
        found = optimizer.metrics()
        assert found.keys() == KEYS
        same(
            found,
            {
                "grad_norm": float(g.norm()),
                "guided_norm": float(guided.norm()),
                "clip_factor": factor,
                "direction_cosine": cosine(g, d),
                "coherence": coherence,
                "source_cosine": cosine(g, s),
                "conflict": float(conflict),
                "damping": 0.0,
                "update_norm": float(moved.norm()),
                "update_factor": 1.0,
                "steps": step,
                "skipped": 0,
            },
        )
        d = ahead
    assert min(seen.values()) >= 2, seen


def test_guided_norm_with_damping() -> None:
    known = parameters()
    damping = 0.8
    optimizer = GradGuide(
        SGD(known.values(), lr=0.1), direction=Direction(decay=DECAY, damping=damping), magnitude=None
    )
    d, mass, square = torch.zeros(10, dtype=torch.float64), 0.0, 0.0
    shrunk = 0
    for g in vectors(8, seed=3, drift=1.0):
        guided, k = g, 0.0
        if mass > 0:
            r2, chance = (float(d.norm()) / mass) ** 2, square / mass**2
            evidence = math.sqrt(max(r2 - chance, 0) / (1 - chance)) if chance < 1 - 1e-9 else 0.0
            k = damping * evidence
            guided = (1 - k) * g + k * max(float(g @ d), 0.0) / float(d @ d) * d
        set_gradient(known, g)
        optimizer.step()
        found = optimizer.metrics()
        lengths = {"grad_norm": float(g.norm()), "guided_norm": float(guided.norm()), "clip_factor": 1.0}
        same(found, lengths | {"damping": k, "update_norm": math.nan, "update_factor": math.nan})
        shrunk += float(guided.norm()) < 0.98 * float(g.norm())
        d = DECAY * d + (1 - DECAY) * g / g.norm()
        mass, square = DECAY * mass + 1 - DECAY, DECAY**2 * square + (1 - DECAY) ** 2
    assert shrunk >= 4


def test_what_is_off_is_nan() -> None:
    known = parameters()
    (g,) = vectors(1, seed=4)
    optimizer = GradGuide(
        SGD(known.values(), lr=0.1), direction=None, magnitude=Magnitude(max_norm=0.5, max_update=None)
    )
    set_gradient(known, g)
    optimizer.step()
    norm = float(g.norm())
    names = (
        "direction_cosine", "coherence", "damping", "source_cosine", "conflict", "update_norm", "update_factor",
    )  # fmt: skip
    off = dict.fromkeys(names, math.nan)
    found = optimizer.metrics()
    assert found.keys() == KEYS
    same(found, {"grad_norm": norm, "guided_norm": norm, "clip_factor": 0.5 / norm, "steps": 1, "skipped": 0, **off})


def test_several_sources() -> None:
    known = parameters()
    along, against, across = vectors(3, seed=5)
    (g,) = vectors(1, seed=6)
    along = g + 0.2 * along
    against = -g + 0.5 * against
    across = across - (across @ g) / (g @ g) * g
    optimizer = GradGuide(
        SGD(known.values(), lr=0.1),
        alignment=Alignment([fixed(v) for v in (along, against, across)], weight=0.0, project=False),
        names=known.items(),
        direction=Direction(),
    )
    assert optimizer.metrics().keys() == KEYS | {
        f"{key}/{k}" for key in ("source_cosine", "conflict", "source_drift") for k in range(3)
    }
    set_gradient(known, g)
    optimizer.step()
    found = optimizer.metrics()
    assert found["source_cosine/2"] == pytest.approx(0.0, abs=1e-7)
    same(
        found,
        {
            "source_cosine/0": cosine(g, along),
            "source_cosine/1": cosine(g, against),
            "conflict/0": 0.0,
            "conflict/1": 1.0,
            "conflict/2": 0.0,
            "source_cosine": cosine(g, against),
            "conflict": 1.0,
        },
    )
    set_gradient(known, along + across)
    optimizer.step()
    assert optimizer.metrics()["conflict"] == (1.0 if (along + across) @ against < 0 else 0.0)


def test_update_norm_is_what_the_parameters_moved_under_adam() -> None:
    known = parameters()
    gradients = vectors(6, seed=9, drift=0.5)
    source = fixed(-vectors(1, seed=10)[0] - 1.0)
    optimizer = GradGuide(
        Adam(known.values(), lr=0.05),
        alignment=Alignment(source, weight=0.0),
        names=known.items(),
        direction=Direction(),
    )
    s = flat(list(source.row(list(SHAPES), list(known.values())).tensors))
    touching = 0
    for g in gradients:
        before = flat(list(known.values()))
        set_gradient(known, g)
        optimizer.step()
        moved = flat(list(known.values())) - before
        same(optimizer.metrics(), {"update_norm": float(moved.norm())}, rel=1e-9)
        # A step along s increases the source loss. A conflicting step was projected and is orthogonal to s.
        assert cosine(moved, s) <= 1e-6
        touching += abs(cosine(moved, s)) < 1e-6
    assert touching >= 1


def test_scopes_are_reported_together() -> None:
    known = parameters()
    s = vectors(1, seed=11)[0]
    max_norm = 1.5
    optimizer = GradGuide(
        SGD(known.values(), lr=0.1),
        direction=Direction(decay=DECAY, damping=0.0),
        alignment=Alignment(fixed(s), weight=0.0, project=False),
        magnitude=Magnitude(max_norm=max_norm, max_update=None),
        scope="tensor",
        names=known.items(),
    )
    d = torch.zeros(10, dtype=torch.float64)
    conflicts = 0
    for step, g in enumerate(vectors(8, seed=12), 1):
        parts, directions, sources = g.split(SIZES), d.split(SIZES), s.split(SIZES)
        ahead = [DECAY * b + (1 - DECAY) * a / a.norm() for a, b in zip(parts, directions, strict=True)]
        clipped = [min(float(a.norm()), max_norm) for a in parts]
        conflict = any(cosine(a, b) < 0 for a, b in zip(parts, sources, strict=True))
        conflicts += conflict
        set_gradient(known, g)
        optimizer.step()
        same(
            optimizer.metrics(),
            {
                "grad_norm": float(g.norm()),
                "guided_norm": float(g.norm()),
                "clip_factor": math.hypot(*clipped) / float(g.norm()),
                "direction_cosine": cosine(g, d),
                "coherence": sum(float(a.norm()) / (1 - DECAY**step) for a in ahead) / 2,
                "source_cosine": cosine(g, s),
                "conflict": float(conflict),
            },
        )
        d = torch.cat(ahead)
    assert 0 < conflicts < 8


@pytest.mark.parametrize("on_device", [False, True])
def test_skipped_steps_are_counted_and_not_measured(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:  # as with a fused base on CUDA, where the host does not know which steps are skipped
        monkeypatch.setattr(nonfinite, "uses_found_inf", lambda measured, base, policy: True)
    known = parameters()
    optimizer = GradGuide(SGD(known.values(), lr=0.1, fused=True), direction=Direction())
    good, bad = vectors(2, seed=13)
    bad[3] = math.inf
    for step, g in enumerate((good, bad, bad, good)):
        set_gradient(known, g)
        optimizer.step()
        found = optimizer.metrics()
        assert found["steps"] == (1, 1, 1, 2)[step]
        assert found["skipped"] == (0, 1, 2, 2)[step]
        assert math.isnan(found["grad_norm"]) == (g is bad)
        known_to_device = {"update_norm": 0.0} if on_device else {}
        if g is bad:
            left = {name: value for name, value in found.items() if not math.isnan(value)}
            assert left == {"steps": 1, "skipped": step, **known_to_device}
    # Only the finite gradient entered the direction.
    same(found, {"direction_cosine": 1.0, "coherence": 1.0})


def test_zero_gradient() -> None:
    known = parameters()
    optimizer = GradGuide(SGD(known.values(), lr=0.1), direction=Direction())
    set_gradient(known, torch.zeros(10, dtype=torch.float64))
    optimizer.step()
    names = ("grad_norm", "guided_norm", "direction_cosine", "coherence", "damping", "update_norm")
    same(optimizer.metrics(), {**dict.fromkeys(names, 0.0), "clip_factor": 1, "update_factor": 1, "steps": 0})


def test_damping_is_the_mean_over_scopes_that_have_a_gradient() -> None:
    """One of two scopes never has a gradient. A single gradient gives no damping."""
    known = parameters()
    optimizer = GradGuide(SGD(known.values(), lr=0.1), direction=Direction(decay=DECAY, damping=0.5), scope="tensor")
    for step in range(30):
        set_gradient(known, torch.cat([torch.ones(6), torch.zeros(4)]).double())
        optimizer.step()
        assert optimizer.metrics()["damping"] == pytest.approx(0.5 if step > 1 else 0.0, abs=1e-5)
