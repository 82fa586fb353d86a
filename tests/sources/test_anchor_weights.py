"""Weights of an anchored source: their scale does not depend on the size of Fisher information or model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradguide.sources.anchor_weights import anchor_weights
from gradguide.utils.constants import LEAST_LENGTH


def tables(scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,)}
    fisher = {name: scale * torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return fisher, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_weights_are_roots_of_fisher_information_over_their_mean_and_the_length_of_the_anchor(scale: float) -> None:
    fisher, anchor = tables(scale)
    roots = torch.cat([table.double().reshape(-1) for table in fisher.values()]).sqrt()
    length = torch.cat([table.double().reshape(-1) for table in anchor.values()]).norm()
    found = torch.cat([table.reshape(-1) for table in anchor_weights(fisher, anchor).values()])
    torch.testing.assert_close(found, (roots / roots.mean() / length).float())


def test_without_fisher_information_weights_are_uniform() -> None:
    fisher, anchor = tables(0.0)
    length = torch.cat([table.reshape(-1) for table in anchor.values()]).norm()
    for table in anchor_weights(fisher, anchor).values():
        torch.testing.assert_close(table, torch.full_like(table, float(1 / length)))


def test_parameters_near_zero_have_the_least_length() -> None:
    fisher, anchor = {"a": torch.ones(100)}, {"a": torch.zeros(100)}
    torch.testing.assert_close(anchor_weights(fisher, anchor)["a"], torch.full((100,), 1 / (LEAST_LENGTH * 10)))


def test_an_empty_table_is_unchanged() -> None:
    empty = {"a": torch.zeros(0)}
    assert anchor_weights(empty, empty) == empty
