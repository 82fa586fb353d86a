"""The approximations of the curvature: each is exact where its assumption holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.language.curvature import Probe


def probe(x: Tensor, d: Tensor, parts: int = 1) -> dict[str, float]:
    """Return the modelled KL of a random change of a layer, for inputs and gradients given in several batches."""
    generator = torch.Generator().manual_seed(7)
    a, b = torch.randn(2, x.shape[-1], generator=generator), torch.randn(d.shape[-1], 2, generator=generator)
    layer = SimpleNamespace(
        lora_A={"default": SimpleNamespace(weight=a)}, lora_B={"default": SimpleNamespace(weight=b)}
    )
    made = Probe(layer)
    for x_part, d_part in zip(x.chunk(parts), d.chunk(parts), strict=True):
        made.add(x_part, d_part)
    return made.modelled(predictions=10)


def test_tokens_that_are_independent_are_a_product_of_moments() -> None:
    """Every input is paired with every gradient, one token per sequence, so plain and weighted moments are exact."""
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(6, 5, generator=generator), torch.randn(4, 3, generator=generator)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(4))
    found = probe(x[pairs[:, 0]][:, None], d[pairs[:, 1]][:, None], parts=3)
    for kind in ("tokens", "sequences", "both"):
        assert found[kind] == pytest.approx(found["exact"], rel=1e-4)


def test_equal_tokens_of_a_sequence_need_its_sums() -> None:
    """Gradients that agree add up over the tokens, which moments of single tokens miss by their number."""
    x, d = torch.ones(1, 8, 5), torch.ones(1, 8, 3)
    found = probe(x, d)
    assert found["sequences"] == pytest.approx(found["exact"], rel=1e-4)
    assert found["both"] == pytest.approx(found["exact"], rel=1e-4)
    assert found["weighted"] == pytest.approx(found["exact"], rel=1e-4)
    assert found["tokens"] == pytest.approx(found["exact"] / 8, rel=1e-4)


def test_weights_follow_a_token_of_long_inputs_and_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    x, d = torch.randn(9, 1, 5, generator=generator) * 1e-3, torch.randn(9, 1, 3, generator=generator) * 1e-3
    x[4], d[4] = 2.0, 3.0
    found = probe(x, d)
    assert found["weighted"] == pytest.approx(found["exact"], rel=1e-3)
    assert found["both"] == pytest.approx(found["exact"] / 9, rel=1e-2)
