"""Compare the gradient of the regularized loss with autograd on the objective in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradguide import Direction, GradGuide, Regularizer, SourceGradient
from tests.contract import kit

WEIGHTS = st.sampled_from([0.0, 0.01, 0.3, 2.0])


class Case:
    """A small smooth network in float64, stepped by SGD at rate 1, so that the update is the gradient."""

    def __init__(self, seed: int, layers: int, weights: Sequence[float], sources: int, scope: str = "global") -> None:
        torch.manual_seed(seed)
        widths = [4, *[5] * (layers - 1), 3]
        stack: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            stack += [nn.Linear(inner, outer), nn.Tanh()]
        self.model = nn.Sequential(*stack[:-1]).double()
        self.x, self.y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
        self.sources = [kit.source_of(self.model, seed=seed + k, moving=k % 2 == 0) for k in range(sources)]
        self.weights = tuple(weights)
        self.scope = scope

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def guide(self, **extra: Any) -> GradGuide:
        d, m, a = self.weights
        options = {"direction": d, "magnitude": m, "alignment": a if self.sources else 0.0, "warmup": 0, **extra}
        if options["alignment"]:
            options["source"] = self.sources
        base = torch.optim.SGD(self.model.parameters(), lr=1.0)
        return GradGuide(
            base,
            direction=Direction(damping=0.0),
            magnitude=None,
            regularizer=Regularizer(**options),
            scope=self.scope,
            names=self.model.named_parameters(),
        )

    def closure(self, optimizer: GradGuide) -> Any:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return evaluate

    def step(self, optimizer: GradGuide) -> list[Tensor]:
        """Make one step and return the gradient that it used."""
        before = kit.parameters_of(self.model)
        optimizer.step(self.closure(optimizer))
        return [old - new for old, new in zip(before, kit.parameters_of(self.model), strict=True)]

    def wanted(self, directions: Sequence[Tensor | None]) -> list[Tensor]:
        """Return autograd's gradient of L + R, with one R per scope."""
        parameters = list(self.model.parameters())
        loss = self.loss()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        names = [name for name, _ in self.model.named_parameters()]
        sources = [_at(source, names, [p.detach() for p in parameters]) for source in self.sources]
        each = [[i] for i in range(len(parameters))] if self.scope == "tensor" else [list(range(len(parameters)))]
        total = loss
        for these in each:
            g = torch.cat([gradients[i].reshape(-1) for i in these])
            d = None if directions[0] is None else _flat(directions, these)
            total = total + self._terms(g, d, [_flat(source, these) for source in sources])
        return list(torch.autograd.grad(total, parameters))

    def _terms(self, g: Tensor, d: Tensor | None, sources: Sequence[Tensor]) -> Tensor:
        direction, magnitude, alignment = self.weights
        total = magnitude * g.square().sum()
        if d is not None and direction:
            total = total + direction * (1 - F.cosine_similarity(g, d, dim=0, eps=0))
        for source in sources if alignment else []:
            total = total + alignment * (1 - F.cosine_similarity(g, source, dim=0, eps=0))
        return total


def _flat(tensors: Sequence[Tensor | None], which: Sequence[int]) -> Tensor:
    return torch.cat([t.double().reshape(-1) for i in which if (t := tensors[i]) is not None])


def _at(source: SourceGradient, names: list[str], values: list[Tensor]) -> list[Tensor]:
    row = source.row(names, values)
    return [row.value(i, torch.float64).reshape(value.shape) for i, value in enumerate(values)]


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    difference = torch.cat([(a - b).reshape(-1) for a, b in zip(found, wanted, strict=True)])
    return float(difference.norm() / torch.cat([w.reshape(-1) for w in wanted]).norm())


@pytest.mark.parametrize("scope", ["global", "tensor"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(2, 3),
    weights=st.tuples(WEIGHTS, WEIGHTS, WEIGHTS).filter(lambda w: w[0] + w[1] > 0),
    sources=st.integers(0, 2),
)
def test_gradient_is_that_of_the_regularised_loss(
    scope: str, seed: int, layers: int, weights: tuple[float, ...], sources: int
) -> None:
    case = Case(seed, layers, weights, sources, scope)
    optimizer = case.guide()
    for step in range(3):
        kept = optimizer._engine.directions
        parameters = list(case.model.parameters())
        # The first step has no direction yet, so that term is zero.
        directions = [kept[p].clone() if p in kept and step else None for p in parameters]
        wanted = case.wanted(directions)
        before = kit.parameters_of(case.model)
        found = case.step(optimizer)
        assert _error(found, wanted) < 1e-4, step
        with torch.no_grad():
            # A step at rate 1 would saturate the units, so use a nearby point.
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old + 0.05 * torch.randn_like(parameter))


def test_terms_do_what_they_say() -> None:
    """Descent on L + R with one term makes that term smaller than descent on L alone."""
    for weights in ((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)):
        case = Case(3, 2, weights, 1)
        optimizer = case.guide()
        case.step(optimizer)
        directions = [optimizer._engine.directions[p].clone() for p in case.model.parameters()]
        regularised, plain = _descended(case, directions, True), _descended(case, directions, False)
        assert regularised < plain, weights


def _descended(case: Case, directions: list[Tensor], regularised: bool) -> float:
    import copy

    model = copy.deepcopy(case.model)
    other = copy.copy(case)
    other.model = model
    for _ in range(5):
        loss = other.loss()
        steps = other.wanted(directions) if regularised else torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), steps, strict=True):
                parameter.sub_(0.05 * step)
    gradients = torch.autograd.grad(other.loss(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    sources = [_at(source, names, [p.detach() for p in model.parameters()]) for source in case.sources]
    every = range(len(directions))
    return float(
        other._terms(_flat(list(gradients), every), _flat(directions, every), [_flat(s, every) for s in sources])
    )


def test_metrics_tell_of_the_loss_alone() -> None:
    """The gradient as received is that of the loss, and so is the running direction."""
    case, plain = Case(5, 2, (0.3, 0.2, 0.0), 0), Case(5, 2, (0.3, 0.2, 0.0), 0)
    optimizer = case.guide()
    case.step(optimizer)
    other = GradGuide(torch.optim.SGD(plain.model.parameters(), lr=1.0), direction=Direction(damping=0.0))
    plain.loss().backward()
    other.step()
    assert optimizer.metrics()["grad_norm"] == pytest.approx(other.metrics()["grad_norm"], rel=1e-12)
    assert optimizer.metrics()["guided_norm"] != pytest.approx(other.metrics()["guided_norm"], rel=1e-3)
    torch.testing.assert_close(kit.directions_of(optimizer), kit.directions_of(other))


def test_weights_rise_over_the_warmup() -> None:
    found = []
    for warmup, weight in ((4, 0.8), (0, 0.2)):
        case = Case(7, 2, (0.0, weight, 0.0), 0)
        found.append(case.step(case.guide(warmup=warmup)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.float16, 0.15), (torch.bfloat16, 0.4)])
def test_finite_differences_in_lower_precision(dtype: torch.dtype, bound: float) -> None:
    """The error of H v, which comes from rounding the perturbed parameters."""
    case = Case(11, 2, (0.0, 0.5, 0.0), 0)
    wanted = case.wanted([None] * 4)
    gradients = torch.autograd.grad(case.loss(), list(case.model.parameters()))
    case.model.to(dtype)
    case.x = case.x.to(dtype)
    optimizer = case.guide()
    optimizer.step(case.closure(optimizer))
    found = [p.grad.double() for p in case.model.parameters() if p.grad is not None]
    added = [w - g for w, g in zip(wanted, gradients, strict=True)]
    assert _error([f - g for f, g in zip(found, gradients, strict=True)], added) < bound
