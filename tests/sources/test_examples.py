"""Count the examples of batches."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import SourceGradient, StructuredSource

from .problems import answer, close, fisher


def packed(lengths: list[int]) -> dict[str, Tensor]:
    """Return sequences concatenated in a single row, like padding-free collators."""
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(1, sum(lengths), 3, generator=generator)
    return {"x": x, "ends": torch.tensor(lengths).cumsum(0)}


def mean_of_means(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean over sequences of their mean output."""
    lengths = batch["ends"].diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()
    return torch.stack([part.mean() for part in model(batch["x"])[0].split(lengths)]).mean()


def test_examples_weigh_batches_by_their_number() -> None:
    model = nn.Linear(3, 1, bias=False)
    batches = [packed([2, 3, 1]), packed([5])]
    source = SourceGradient.capture(
        model, batches, mean_of_means, curvature=False, examples=lambda batch: len(batch["ends"])
    )
    assert source.metadata["examples"] == 4
    first = batches[0]["x"][0]
    means = [first[:2].mean(0), first[2:5].mean(0), first[5:].mean(0), batches[1]["x"][0].mean(0)]
    close(answer(source), {"weight": torch.stack(means).mean(0)[None]}, rtol=1e-5, atol=1e-6)


def test_tensors_that_differ_in_their_first_dimension_warn_once() -> None:
    batches = [packed([2, 3, 1]), packed([5]), packed([1, 1])]
    with pytest.warns(UserWarning) as caught:
        source = SourceGradient.capture(nn.Linear(3, 1), batches, mean_of_means, curvature=False)
    (warning,) = caught
    assert "batch 0 is counted as 1 examples" in str(warning.message)
    assert "shapes (1, 6, 3), (3,)" in str(warning.message)
    assert "examples=lambda batch" in str(warning.message)
    assert warning.filename == __file__
    assert source.metadata["examples"] == 3


def test_no_warning_with_a_count_or_with_equal_dimensions() -> None:
    model = nn.Linear(3, 1)
    pairs = [(torch.ones(2, 3), torch.ones(2), torch.tensor(7)), (torch.ones(1, 3), torch.ones(1, 5))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SourceGradient.capture(model, [packed([1, 2])], mean_of_means, curvature=False, examples=lambda batch: 2)
        SourceGradient.capture(model, pairs, lambda m, b: m(b[0]).mean(), curvature=False)


class Graph:
    """A batch that is neither tensor, mapping nor sequence."""

    def __init__(self, graphs: int) -> None:
        self.nodes, self.num_graphs = torch.randn(7, 3), graphs


def of_graph(model: nn.Module, batch: Graph) -> Tensor:
    loss: Tensor = model(batch.nodes).mean()
    return loss


def test_any_kind_of_batch_with_a_count() -> None:
    batches = [Graph(2), Graph(3)]
    source = SourceGradient.capture(
        nn.Linear(3, 1), batches, of_graph, curvature=False, examples=lambda batch: batch.num_graphs
    )
    assert source.metadata["examples"] == 5
    with pytest.raises(TypeError, match=r"found Graph; for other types pass examples=lambda batch"):
        SourceGradient.capture(nn.Linear(3, 1), batches, of_graph)


def token_mean(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the mean output over all tokens, and their number."""
    return model(batch["x"]).mean(), batch["x"].shape[1]


def test_a_loss_that_returns_a_count_weighs_batches_by_it() -> None:
    model = nn.Linear(3, 1, bias=False)
    batches = [packed([2, 3, 1]), packed([5])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = SourceGradient.capture(model, batches, token_mean, curvature=False)
    assert source.metadata["examples"] == 11
    tokens = torch.cat([batch["x"][0] for batch in batches])
    close(answer(source), {"weight": tokens.mean(0)[None]}, rtol=1e-5, atol=1e-6)
    counted = SourceGradient.capture(model, batches, token_mean, curvature=False, examples=lambda batch: 1)
    assert counted.fingerprint() == source.fingerprint()


def test_the_curvature_is_weighed_by_the_count_of_its_own_loss() -> None:
    model = nn.Linear(3, 1, bias=False)
    batches = [packed([2, 3, 1]), packed([5])]
    source = SourceGradient.capture(
        model, batches, mean_of_means, curvature=token_mean, examples=lambda batch: len(batch["ends"])
    )
    assert source.metadata["examples"] == 4
    sums = torch.stack([batch["x"][0].sum(0) for batch in batches])
    close(fisher(source, model), {"weight": (sums.square().sum(0) / 11)[None]}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, -3, 2.5, "2", None])
def test_a_loss_that_returns_no_count(count: Any) -> None:
    model = nn.Linear(3, 1)
    match = f"loss must return a count, a whole number of at least 1, found {re.escape(repr(count))} on batch 0"
    with pytest.raises(ValueError, match=match):
        SourceGradient.capture(model, [torch.ones(2, 3)], lambda m, b: (m(b).mean(), count), curvature=False)
    with pytest.raises(ValueError, match=match):
        StructuredSource.capture(model, [torch.ones(2, 3)], lambda m, b: (m(b).mean(), count))


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        (3, TypeError, "examples must be a function of a batch, found 3"),
        (lambda batch: 2.5, TypeError, r"whole number, found 2\.5 for batch 0"),
        (lambda batch: None, TypeError, "whole number, found None for batch 0"),
        (lambda batch: 0, ValueError, "at least 1, found 0 for batch 0"),
        (lambda batch: -1, ValueError, "at least 1, found -1 for batch 0"),
    ],
)
def test_counts_that_are_none(examples: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SourceGradient.capture(nn.Linear(3, 1), [Graph(1)], of_graph, examples=examples)
