"""Blocks cover every element of every scope once, and are of bounded size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradguide.ops import Row, Stack
from gradguide.ops import blocks as module
from gradguide.ops.allocate import allocate_contiguous
from gradguide.ops.blocks import blocks, tensors_of

LARGE = 10


@given(st.lists(st.lists(st.integers(0, 35), max_size=5), min_size=1, max_size=4).filter(any))
def test_every_element_once_in_order_and_at_most_so_many(scopes: list[list[int]]) -> None:
    lengths = [length for scope in scopes for length in scope]
    tensors = list(torch.arange(float(sum(lengths))).split(lengths))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "LARGE", LARGE)
        found = list(blocks(Stack([Row(offset=tensors)], list(map(len, scopes)))))
    taken = [torch.cat(tensors_of(tensors, block)) for block in found]
    assert torch.cat([torch.empty(0), *taken]).tolist() == list(range(sum(lengths)))
    assert all(len(each) <= LARGE for each in taken)
    sizes = [
        sum(len(each) for each, block in zip(taken, found, strict=True) if block.scope == s) for s in range(len(scopes))
    ]
    assert sizes == list(map(sum, scopes))


def test_a_large_tensor_that_is_not_contiguous_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", LARGE)
    rows: list[Row | None] = [Row(offset=[torch.ones(6, 5).t()]), Row(offset=[torch.ones(5, 6)])]
    assert [block.stop for block in blocks(rows)] == [None]


def test_tensors_laid_out_together_begin_where_those_of_their_own_would() -> None:
    like = [torch.ones(3), torch.ones(0), torch.ones(17, 2), torch.ones((), dtype=torch.bfloat16), torch.ones(5)]
    for dtype in (None, torch.float64):
        made = allocate_contiguous(like, dtype)
        assert [t.shape for t in made] == [t.shape for t in like]
        assert {t.dtype for t in made} == ({dtype} if dtype else {torch.float32, torch.bfloat16})
        assert all(t.data_ptr() % 64 == 0 and t.eq(0).all() for t in made if t.numel())
        made[0].fill_(1.0)
        assert all(t.eq(0).all() for t in made[1:])
