"""Compare whole steps with a second implementation of the method: flat float64 vectors, no Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient

SHAPES = [(4, 3), (5,), (2, 2)]
SIZE = sum(math.prod(shape) for shape in SHAPES)


@dataclass
class Oracle:
    """One scope, one source, SGD with learning rate ``lr`` as the base."""

    theta: Tensor
    lr: float
    decay: float
    damping: float
    weight: float
    on: str
    max_norm: float
    largest: float
    s0: Tensor
    fisher: Tensor
    anchor: Tensor
    d: Tensor = field(default_factory=lambda: torch.zeros(SIZE, dtype=torch.float64))
    history: list[float] = field(default_factory=list)

    def step(self, g: Tensor) -> None:
        source = self.s0 + self.fisher * (self.theta - self.anchor)
        guided = g
        if self.history and float(self.d.norm()) > 0:
            n = len(self.history)
            weights = torch.tensor([(1 - self.decay) * self.decay ** (n - 1 - i) for i in range(n)]).double()
            chance = float((weights**2).sum() / weights.sum() ** 2)
            r2 = float(self.d.norm() / weights.sum()) ** 2
            seen = math.sqrt(min(1.0, max(0.0, (r2 - chance) / (1 - chance)))) if 1 - chance > 1e-6 else 0.0
            unit = self.d / self.d.norm()
            k = self.damping * seen
            guided = (1 - k) * g + k * max(0.0, float(g @ unit)) * unit
        guided = guided + self.weight * source
        if self.on == "gradient":
            guided = self.free(guided, source)
        norm = float(guided.norm())
        guided = guided * min(1.0, self.max_norm / norm)
        self.d = self.decay * self.d + (1 - self.decay) * g / g.norm()
        self.history.append(1.0)
        update = -self.lr * guided
        length = max(float(self.theta.norm()), 0.01 * math.sqrt(SIZE))
        update = update * min(1.0, self.largest * length / float(update.norm()))
        if self.on == "update":
            update = -self.free(-update, source)
        self.theta = self.theta + update

    @staticmethod
    def free(vector: Tensor, source: Tensor) -> Tensor:
        return vector - min(0.0, float(vector @ source)) / float(source @ source) * source


def parameters(flat: Tensor) -> list[nn.Parameter]:
    parts = flat.clone().split([math.prod(shape) for shape in SHAPES])
    return [nn.Parameter(part.view(shape)) for part, shape in zip(parts, SHAPES, strict=True)]


def flat(tensors: list[nn.Parameter]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def fill(tensors: list[nn.Parameter], gradient: Tensor) -> None:
    for parameter, part in zip(tensors, gradient.split([t.numel() for t in tensors]), strict=True):
        parameter.grad = part.view(parameter.shape).clone()


def source_of(s0: Tensor, fisher: Tensor, anchor: Tensor) -> SourceGradient:
    tables = ({f"p{i}": p.detach() for i, p in enumerate(parameters(vector))} for vector in (s0, fisher, anchor))
    gradient, second, third = tables
    return SourceGradient(gradient, fisher=second, anchor=third)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    decay=st.sampled_from([0.0, 0.3, 0.9, 0.99]),
    damping=st.floats(0.0, 1.0),
    weight=st.sampled_from([0.0, 0.5, 100.0]),
    on=st.sampled_from(["update", "gradient"]),
    max_norm=st.sampled_from([0.1, 1.0, math.inf]),
    largest=st.sampled_from([0.02, 0.1, 1e9]),
)
def test_steps_are_the_methods(
    seed: int,
    decay: float,
    damping: float,
    weight: float,
    on: str,
    max_norm: float,
    largest: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(SIZE, generator=generator, dtype=torch.float64)

    theta, s0, fisher, anchor, shared = draw(), draw(), draw().abs(), draw(), draw()
    oracle = Oracle(theta, 0.1, decay, damping, weight, on, max_norm, largest, s0, fisher, anchor)
    trained = parameters(theta)
    optimizer = GradGuide(
        torch.optim.SGD(trained, lr=0.1),
        direction=Direction(decay=decay, damping=damping),
        alignment=Alignment(source_of(s0, fisher, anchor), on=on, weight=weight),
        magnitude=Magnitude(max_norm=max_norm, max_update=largest),
        names=[(f"p{i}", p) for i, p in enumerate(trained)],
    )
    for _ in range(6):
        gradient = shared + draw()
        fill(trained, gradient)
        optimizer.step()
        oracle.step(gradient)
        # The direction is stored in float32, which limits the accuracy of everything computed from it.
        assert torch.allclose(flat(trained), oracle.theta, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), base=st.sampled_from(["SGD", "AdamW", "RMSprop"]))
def test_no_update_conflicts_with_a_source_whatever_the_base_makes_of_the_gradient(
    seed: int, count: int, base: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    trained = parameters(torch.randn(SIZE, generator=generator, dtype=torch.float64))
    vectors = [torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(count)]
    sources = [SourceGradient({f"p{i}": p.detach() for i, p in enumerate(parameters(vector))}) for vector in vectors]
    optimizer = GradGuide(
        getattr(torch.optim, base)(trained, lr=0.01),
        alignment=Alignment(sources, weight=0.0),
        names=[(f"p{i}", p) for i, p in enumerate(trained)],
        direction=Direction(),
    )
    conflicts = 0.0
    for _ in range(5):
        before = flat(trained)
        fill(trained, torch.randn(SIZE, generator=generator, dtype=torch.float64))
        optimizer.step()
        update = flat(trained) - before
        conflicts += optimizer.metrics()["conflict"]
        for vector in vectors:
            assert float(update @ vector) <= 1e-5 * float(update.norm() * vector.norm())
    if count > 2:
        assert conflicts > 0


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_decisions_do_not_depend_on_the_scale_of_all_gradients(scale: float, scope: str) -> None:
    generator = torch.Generator().manual_seed(5)
    s0 = torch.randn(SIZE, generator=generator)
    gradients = [s0 + 2 * torch.randn(SIZE, generator=generator) for _ in range(6)]
    found = []
    for factor in (1.0, scale):
        trained = parameters(torch.zeros(SIZE))
        source = SourceGradient({f"p{i}": p.detach() for i, p in enumerate(parameters(s0))})
        optimizer = GradGuide(
            torch.optim.SGD(trained, lr=1.0 / factor),
            alignment=Alignment(source, on="gradient", weight=0.0),
            magnitude=Magnitude(max_norm=2.0 * factor),
            scope=scope,
            names=[(f"p{i}", p) for i, p in enumerate(trained)],
            direction=Direction(),
        )
        rows = []
        for gradient in gradients:
            fill(trained, gradient * factor)
            optimizer.step()
            metrics = optimizer.metrics()
            rows.append(
                [metrics[key] for key in ("direction_cosine", "coherence", "source_cosine", "conflict", "clip_factor")]
            )
            rows.append([metrics["guided_norm"] / factor] * 5)
        directions = [entry["gradguide.direction"].reshape(-1) for entry in optimizer.state_dict()["state"].values()]
        found.append(torch.cat([torch.tensor(rows).reshape(-1), flat(trained), *directions]))
    assert found[1].isfinite().all()
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_opposite_and_zero_gradients_stay_finite() -> None:
    trained = parameters(torch.ones(SIZE))
    optimizer = GradGuide(torch.optim.AdamW(trained, lr=0.1), direction=Direction())
    gradient = torch.randn(SIZE)
    for factor in (0.0, 1.0, -1.0, 0.0, 1e30, -1e-30):
        fill(trained, gradient * factor)
        optimizer.step()
        assert flat(trained).isfinite().all()
        assert 0 <= optimizer.metrics()["coherence"] <= 1


def test_a_step_inside_autocast_is_the_same() -> None:
    results = []
    for enabled in (False, True):
        generator = torch.Generator().manual_seed(0)
        trained = parameters(torch.ones(SIZE))
        optimizer = GradGuide(torch.optim.AdamW(trained, lr=0.1), direction=Direction())
        for _ in range(4):
            fill(trained, torch.randn(SIZE, generator=generator))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        results.append(flat(trained))
    assert torch.equal(*results)
