"""Compare captured Fisher information with per-example loops, exact expectations and closed forms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradguide import SourceGradient

from .problems import Table, answer, close, cross_entropy, fisher, per_example, softmax_problem, split


def mean_square(gradients: Table) -> Table:
    return {name: g.square().mean(dim=0) for name, g in gradients.items()}


def linear(model: nn.Module, x: Tensor) -> Tensor:
    """Return a loss whose per-example gradient is x."""
    loss: Tensor = model(x).mean()
    return loss


def partitions(items: Sequence[int], sizes: Sequence[int]) -> Iterator[list[list[int]]]:
    """Yield all ordered ways to split the items into batches of the given sizes."""
    if not sizes:
        yield []
        return
    for first in itertools.combinations(items, sizes[0]):
        for rest in partitions([i for i in items if i not in first], sizes[1:]):
            yield [list(first), *rest]


def test_batches_of_one_are_the_loop() -> None:
    model, x, y = softmax_problem(12)
    explicit = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(12):
        model.zero_grad()
        cross_entropy(model, (x[i : i + 1], y[i : i + 1])).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            explicit[name] += p.grad.square() / 12
    source = SourceGradient.capture(model, split(x, y, [1] * 12), cross_entropy, dtype=torch.float64)
    found = fisher(source, model)
    close(found, {name: value.detach() for name, value in explicit.items()})
    close(found, mean_square(per_example(model, x, y)))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2), (3, 2, 1), (2, 1, 1, 1), (5, 1)])
def test_expectation_over_all_partitions_is_exact(sizes: tuple[int, ...]) -> None:
    # Gradients with a clear mean, so that no estimate needs clamping at zero, which alone would bias it.
    generator = torch.Generator().manual_seed(3)
    number = sum(sizes)
    x = 1.0 + 0.3 * torch.rand(number, 2, generator=generator, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    estimates = []
    for batches in partitions(range(number), sizes):
        source = SourceGradient.capture(model, [x[batch] for batch in batches], linear, dtype=torch.float64)
        estimates.append(fisher(source, model)["weight"])
    assert len(estimates) == math.factorial(number) // math.prod(math.factorial(n) for n in sizes)
    table = torch.stack(estimates)
    assert (table > 0).all()
    assert table.std(dim=0).min() > 1e-3
    torch.testing.assert_close(table.mean(dim=0), x.square().mean(dim=0, keepdim=True), rtol=1e-12, atol=0)


def test_small_batches_are_unbiased() -> None:
    model, x, y = softmax_problem(40, features=2, classes=2, seed=1)
    wanted = mean_square(per_example(model, x, y))
    sizes = [2, 3, 4] * 4 + [4]
    generator = torch.Generator().manual_seed(0)
    estimates: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for _ in range(50):
        order = torch.randperm(40, generator=generator)
        source = SourceGradient.capture(model, split(x[order], y[order], sizes), cross_entropy, dtype=torch.float64)
        for name, value in fisher(source, model).items():
            estimates[name].append(value)
    for name, values in estimates.items():
        table = torch.stack(values)
        error = table.std(dim=0) / math.sqrt(len(values))
        assert ((table.mean(dim=0) - wanted[name]).abs() < 4 * error).all(), name
        # The tolerance excludes an estimate that ignores the batch size: it is off by a factor of about 3.
        assert (error < 0.1 * wanted[name]).all(), name


def test_never_negative() -> None:
    # One large batch among small ones, all with equal sums: the unbiased estimate without clamping is -0.29.
    x = torch.tensor([[0.125]] * 8 + [[1.0], [1.0]], dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    source = SourceGradient.capture(model, x.split([8, 1, 1]), linear, dtype=torch.float64)
    assert fisher(source, model)["weight"].item() == 0


def test_true_fisher_in_exact_expectation() -> None:
    """The mean over all label assignments, weighted by their probability, is the analytic Fisher information."""
    model, x, y = softmax_problem(3, features=2, classes=2)
    probabilities = (x @ model.weight.T + model.bias).softmax(dim=1).detach()
    wanted: Table = {}
    for label in range(2):
        for name, g in per_example(model, x, torch.full((3,), label)).items():
            weight = probabilities[:, label].reshape(-1, *[1] * (g.dim() - 1))
            wanted[name] = wanted.get(name, torch.zeros_like(g[0])) + (weight * g.square()).mean(dim=0)
    for sizes in ([3], [2, 1], [1, 1, 1]):
        expected: Table = {name: torch.zeros_like(value) for name, value in wanted.items()}
        for labels in itertools.product(range(2), repeat=3):
            drawn = torch.tensor(labels)
            weight = probabilities[torch.arange(3), drawn].prod()
            left = iter(drawn.split(sizes))

            def sampled(m: nn.Module, batch: Sequence[Tensor], left: Iterator[Tensor] = left) -> Tensor:
                return F.cross_entropy(m(batch[0]), next(left))

            source = SourceGradient.capture(
                model, split(x, y, sizes), cross_entropy, curvature=sampled, dtype=torch.float64
            )
            for name, value in fisher(source, model).items():
                expected[name] += weight * value
        close(expected, wanted)


def test_true_fisher_from_drawn_labels() -> None:
    model, x, _ = softmax_problem(1600, features=2, classes=2, seed=5)
    y = torch.zeros(1600, dtype=torch.long)  # wrong labels: the empirical Fisher information differs
    probabilities = (x @ model.weight.T + model.bias).softmax(dim=1).detach()
    variance = probabilities.prod(dim=1)
    wanted = (variance[:, None] * x.square()).mean(dim=0).expand(2, 2)

    def sampled(m: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        scores: Tensor = m(batch[0])
        return F.cross_entropy(scores, torch.multinomial(scores.detach().softmax(dim=1), 1).squeeze(1))

    torch.manual_seed(0)
    source = SourceGradient.capture(
        model, split(x, y, [4] * 400), cross_entropy, curvature=sampled, dtype=torch.float64
    )
    assert source.metadata["curvature"] == "true"
    gradients = per_example(model, x, y)
    # s0 is still that of the given labels.
    close(answer(source, dict(model.named_parameters())), {name: g.mean(dim=0) for name, g in gradients.items()})
    torch.testing.assert_close(fisher(source, model)["weight"], wanted, rtol=0.2, atol=0)
    empirical = mean_square(gradients)["weight"]
    assert ((empirical / wanted - 1).abs() > 0.4).all()


def test_one_batch_is_enough_for_drawn_labels() -> None:
    model, x, y = softmax_problem(6)
    source = SourceGradient.capture(model, [(x, y)], cross_entropy, curvature=cross_entropy, dtype=torch.float64)
    g = {name: value.mean(dim=0) for name, value in per_example(model, x, y).items()}
    close(fisher(source, model), {name: 6 * value.square() for name, value in g.items()})


def test_moving_answer() -> None:
    model, x, y = softmax_problem(7)
    source = SourceGradient.capture(model, split(x, y, [1] * 7), cross_entropy, dtype=torch.float64)
    gradients = per_example(model, x, y)
    here = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    there = {name: p.detach() for name, p in model.named_parameters()}
    wanted = {
        name: g.mean(dim=0) + g.square().mean(dim=0) * (there[name] - here[name]) for name, g in gradients.items()
    }
    close(answer(source, there), wanted)
    close(answer(source, here), {name: g.mean(dim=0) for name, g in gradients.items()})


def test_moving_answer_is_the_gradient_of_a_quadratic_loss() -> None:
    """For least squares with one feature per example, F is the Hessian, so the model of the gradient is exact."""
    x = torch.diag(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)).repeat(2, 1)
    y = torch.randn(8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)

    def squares(m: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        loss: Tensor = 0.5 * (m(batch[0]) - batch[1]).square().mean()
        return loss

    def one(m: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        # A residual of 1 equals the standard deviation of the model's unit noise.
        predicted = m(batch[0])
        loss: Tensor = 0.5 * (predicted - predicted.detach() - 1.0).square().mean()
        return loss

    source = SourceGradient.capture(model, split(x, y, [1] * 8), squares, curvature=one, dtype=torch.float64)
    close(fisher(source, model), {"weight": x.square().mean(dim=0, keepdim=True)})
    for step in range(3):
        with torch.no_grad():
            model.weight.add_(torch.randn(1, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
            true = ((model(x) - y) * x).mean(dim=0, keepdim=True)
        close(answer(source, {"weight": model.weight}), {"weight": true}, rtol=1e-10)
