"""Merge several sources into one, and reject files of 8-bit sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradguide import SourceGradient
from gradguide.ops import Row
from gradguide.sources import files as file
from tests.contract import kit


def fixed(seed: int = 7) -> SourceGradient:
    return kit.source_of(kit.net(), seed=seed, moving=False)


def flat(row: Row) -> torch.Tensor:
    return torch.cat([row.value(index, torch.float64) for index in range(len(row.tensors))])


def test_a_file_in_8_bits_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    tables = {"gradient": {"w": torch.ones(3, dtype=torch.int8)}, "steps": {"w": torch.ones(1)}}
    file.write(path, tables, {"names": ["w"]})
    with pytest.raises(ValueError, match=r"8-bit sources are no longer supported: capture it again, or load it with"):
        SourceGradient.load(path)


def test_captured_in_8_bits_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="int8"):
        SourceGradient.capture(
            kit.net(), [torch.ones(2, 4)], lambda m, b: m(b).square().mean(), curvature=False, dtype=torch.int8
        )


def test_merging_answers_with_the_sum_of_the_answers_everywhere() -> None:
    """The result is exact at any parameters, also with curvature."""
    torch.manual_seed(0)
    sources = [kit.source_of(kit.net(), seed=seed) for seed in (1, 2, 3)]
    weights = [0.5, 0.0, 2.0]
    for chosen, given in ((sources, weights), (sources, None), ([s.anchored() for s in sources], [1.0, 1.0, 1.0])):
        merged = SourceGradient.merge(chosen, given)
        at = [torch.randn_like(p) for p in kit.net().parameters()]
        names = merged.names()
        each = [flat(source.row(names, at)) for source in chosen]
        wanted = sum(
            (w * row for w, row in zip(given or [1 / 3] * 3, each, strict=True)), torch.zeros((), dtype=torch.float64)
        )
        torch.testing.assert_close(flat(merged.row(names, at)), wanted, rtol=1e-5, atol=1e-6)
    assert merged.weight == 1.0, "what is anchored stays so"


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=["bfloat16", "mixed"])
def test_merging_anchors_of_16_bits_is_exact_too(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Rounded to bfloat16, the mean of the anchors gave a gradient that was wrong by a quarter."""
    torch.manual_seed(0)
    start = torch.randn(1000)
    near = [(start * (1 + 1e-3 * torch.randn(1000))).bfloat16() for _ in range(3)]
    sources = [
        SourceGradient(None, fisher={"w": torch.rand(1000)}, anchor={"w": anchor.to(dtype)})
        for anchor, dtype in zip(near[:2], dtypes, strict=True)
    ]
    merged = flat(SourceGradient.merge(sources, [1.0, 1.0]).row(["w"], near[2:]))
    wanted = torch.stack([flat(source.row(["w"], near[2:])) for source in sources]).sum(0)
    assert float((merged - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_merging_without_curvature() -> None:
    merged = SourceGradient.merge([fixed(1), fixed(2)], [1.0, 1.0])
    at = list(kit.net().parameters())
    wanted = flat(fixed(1).row(merged.names(), at)) + flat(fixed(2).row(merged.names(), at))
    torch.testing.assert_close(flat(merged.row(merged.names(), at)), wanted)


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        (list, None, "at least one source"),
        (lambda: [fixed(1)], [1.0, 2.0], "one for each of 1 sources, found 2"),
        (lambda: [fixed(1)], [-1.0], r"weight must be in \[0, inf\), found -1.0"),
        (lambda: [fixed(1)], [0.0], "must not all be 0"),
        (lambda: [fixed(1), kit.source_of(kit.net())], None, "they must be equal"),
        (lambda: [fixed(1), SourceGradient({"w": torch.ones(2)})], None, "differs from source 0 in names or shapes"),
    ],
)
def test_sources_that_do_not_merge(sources: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceGradient.merge(sources(), weights)
