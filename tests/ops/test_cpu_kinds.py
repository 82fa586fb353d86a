"""Rows of every kind in the compiled passes: float32 and bfloat16, few and many, against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradguide.ops import Row, Write, cpu, foreach, reference

KINDS = (torch.float32, torch.bfloat16)
# Blocks end inside and between tensors, and ranges of threads inside both.
SHAPES = ((3, 5), (), (0, 4), (128,), (7, 611), (4096,), (90, 101))


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu._cpu is None:
        pytest.skip("the extension is not built")
    monkeypatch.setattr(foreach, "gram", None)
    monkeypatch.setattr(foreach, "combine_", None)


def values(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def row(seed: int, kind: torch.dtype, scale: float = 1.0) -> Row:
    return Row(offset=[t.to(kind) for t in values(seed, scale)])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sources", [1, 2, 3, 5, 7, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_sums_are_the_oracles(
    kind: torch.dtype, sources: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_threads", lambda lengths: threads)
    # One source in three is of the next kind: tiles of four hold rows of one kind or of two.
    kinds = [kind if k % 3 else KINDS[(KINDS.index(kind) + 1) % 2] for k in range(1, sources + 1)]
    rows: list[Row | None] = [Row(offset=values(100)), Row(offset=values(101))]
    rows += [row(k, kind) for k, kind in enumerate(kinds)]
    rows.insert(1, None)
    expected = reference.gram(rows)[0]
    lengths = expected.diagonal().sqrt()
    found = cpu.gram(rows)[0]
    assert torch.equal(found, found.T)
    assert ((found - expected).abs() <= 1e-5 * lengths.outer(lengths) + 1e-12).all()

    coefficients = [torch.linspace(-1, 2, len(rows), dtype=torch.float64).unsqueeze(0) for _ in range(2)]
    coefficients[1][:, 4:] = 0.0
    found_into, expected_into = ([values(200), values(201)] for _ in range(2))
    for backend, into in ((cpu, found_into), (reference, expected_into)):
        backend.combine_(
            rows,
            [
                Write(into=into[0], coefficients=coefficients[0], accumulate=True),
                Write(into=into[1], coefficients=coefficients[1]),
            ],
        )
    for found_list, expected_list in zip(found_into, expected_into, strict=True):
        for mine, oracles in zip(found_list, expected_list, strict=True):
            assert torch.allclose(mine, oracles, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-18, 1e16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_beyond_float32_are_taken_in_float64(kind: torch.dtype, scale: float) -> None:
    rows: list[Row | None] = [Row(offset=values(100, scale)), *(row(k, kind, scale) for k in range(3))]
    expected = reference.gram(rows)[0, 0]
    found = cpu.gram(rows)[0, 0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected[0]))


def test_a_moving_row_may_be_stored_in_bfloat16() -> None:
    now, before = values(0), values(1)
    offset, scale = ([t.bfloat16() for t in values(seed)] for seed in (2, 3))
    rows: list[Row | None] = [Row(offset=values(4)), Row(offset=offset, scale=scale, at=now, anchor=before)]
    assert torch.allclose(cpu.gram(rows), reference.gram(rows), rtol=1e-5, atol=1e-2)


def test_what_is_written_in_bfloat16_is_rounded_as_torch_rounds() -> None:
    exact = torch.cat(
        [torch.randn(5000), torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40, -0.0])]
    )
    into = [torch.zeros(len(exact), dtype=torch.bfloat16)]
    cpu.combine_([Row(offset=[exact])], [Write(into=into, coefficients=torch.tensor([[1.0]]))])
    expected = (exact * 1.0 + 0.0).bfloat16()
    assert torch.equal(into[0].view(torch.int16)[exact == exact], expected.view(torch.int16)[exact == exact])
    assert into[0][exact != exact].isnan().all()
    cpu.combine_([Row(offset=into)], [Write(into=into, coefficients=torch.tensor([[1.0]]), accumulate=True)])
    assert torch.equal(into[0][:5000], expected[:5000] * 2)
