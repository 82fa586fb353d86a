"""Rows: accepted forms and their values, scopes of a stack, and writes of the right shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradguide.ops.row import Row, Stack, Write, check_writes, lists_of, scopes_of, sizes_of


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((2, 3), (4,), ())]


A, B, C, D = (tensors(seed) for seed in range(4))


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ({"offset": A}, lambda i: A[i]),
        ({"at": A, "anchor": B}, lambda i: A[i] - B[i]),
        ({"at": A, "anchor": B, "scale": C}, lambda i: (A[i] - B[i]) * C[i]),
        ({"at": A, "anchor": B, "offset": D}, lambda i: A[i] - B[i] + D[i]),
        ({"at": A, "anchor": B, "scale": C, "offset": D}, lambda i: (A[i] - B[i]) * C[i] + D[i]),
    ],
)
def test_the_value_of_each_form(parts: dict[str, Any], wanted: Any) -> None:
    row = Row(**parts)
    for index in range(3):
        found = row.value(index, torch.float64)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted(index).reshape(-1).double())
        before = A[index].clone()
        found.zero_()
        assert torch.equal(A[index], before), "the value is a copy"
    assert len(row.parts) == len(parts)


@pytest.mark.parametrize("parts", [{}, {"scale": A}, {"at": A}, {"anchor": A}, {"offset": A, "scale": B}])
def test_other_forms_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a row"):
        Row(**parts)


def test_scopes_are_consecutive() -> None:
    assert list(scopes_of([None, Row(offset=A)])) == [range(3)]
    rows = Stack([Row(offset=A), None], [1, 0, 2])
    assert list(sizes_of(rows)) == [1, 0, 2]
    assert scopes_of(rows) == [range(1), range(1, 1), range(1, 3)]


def test_a_write_has_a_coefficient_for_every_scope_and_row() -> None:
    rows = Stack([Row(offset=A), None], [1, 2])
    check_writes(rows, [Write(into=A, coefficients=torch.zeros(2, 2))])
    for shape in ((1, 2), (2, 1), (2,)):
        with pytest.raises(ValueError, match=r"2 scopes and 2 rows, found shape"):
            check_writes(rows, [Write(into=A, coefficients=torch.zeros(shape))])


def test_all_lists_of_a_pass_are_found() -> None:
    write = Write(into=D, coefficients=torch.zeros(1, 2))
    found = lists_of([Row(offset=A), None, Row(at=B, anchor=C)], [write])
    assert [id(part) for part in found] == [id(A), id(B), id(C), id(D)]
