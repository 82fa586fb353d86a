"""Kernel operands and device arrays: shared columns, copies and eviction."""

from __future__ import annotations

from array import array

import pytest
import torch
from torch import Tensor

from gradguide.ops import Row, Write
from gradguide.ops import triton as ops
from gradguide.ops.triton import launch
from gradguide.ops.triton.device_arrays import DeviceArrayCache, bounds_of, chunk_numbers
from gradguide.ops.triton.kernels.combine import combine
from gradguide.ops.triton.kernels.measure import finish, measure
from gradguide.ops.triton.operands import operands_of
from tests.ops.triton.problems import DEVICE, tensors

SHAPES = [(5,), (2, 3)]


def test_a_list_in_several_places_is_one_column() -> None:
    now, before, fisher = (tensors(seed, SHAPES) for seed in range(3))
    rows = [Row(at=now, anchor=before), Row(scale=fisher, at=before, anchor=now)]
    columns = operands_of(rows, [Write(into=now, coefficients=torch.ones(1, 2), accumulate=True)])
    assert columns is not None
    assert len(columns.dtypes) == 3
    assert columns.rows == ((-1, -1, 0, 1), (-1, 2, 1, 0))
    assert columns.writes == ((0, True),)
    assert list(columns.lengths) == [5, 6]
    assert list(columns.addresses) == [t.data_ptr() for part in (now, before, fisher) for t in part]


def test_chunks_cover_every_element_once() -> None:
    lengths = array("q", [0, 10, 0, 3, 8, 1])
    sizes = array("q", [0, 3, 2, 0, 1])
    chunks = chunk_numbers(lengths, sizes, 4).tolist()
    assert chunks == [[1, 0, 1], [1, 1, 1], [1, 2, 1], [3, 0, 2], [4, 0, 2], [4, 1, 2], [5, 0, 4]]
    assert bounds_of(lengths, sizes, 4).tolist() == [0, 0, 3, 6, 6, 7]
    empty = array("q", [0])
    assert chunk_numbers(empty, array("q", [1]), 4).shape == (0, 3)
    assert bounds_of(empty, array("q", [1]), 4).tolist() == [0, 0]


def test_tables_are_copied_only_when_an_address_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DeviceArrayCache()
    monkeypatch.setattr(launch, "_arrays", kept)
    g = tensors(0, SHAPES)
    first = ops.gram([Row(offset=g)])
    entries = len(kept)
    assert torch.equal(ops.gram([Row(offset=g)]), first)
    assert len(kept) == entries == 4  # addresses, lengths, chunks and their bounds
    g[0] = g[0].clone()
    assert torch.equal(ops.gram([Row(offset=g)]), first)
    assert len(kept) == entries + 1


def test_tables_used_longest_ago_go_first() -> None:
    kept, made = DeviceArrayCache(budget=3 * 80), []

    def get(number: int) -> Tensor:
        def make() -> Tensor:
            made.append(number)
            return torch.full((10,), number)

        return kept.get(torch.device("cpu"), "some", bytes([number]), make)

    for number in (1, 2, 3, 1, 4, 1, 3, 2):
        assert get(number).tolist() == [number] * 10
    assert made == [1, 2, 3, 4, 2]


def test_one_table_larger_than_the_budget_is_kept_while_it_is_used() -> None:
    kept = DeviceArrayCache(budget=8)
    for _ in range(2):
        kept.get(torch.device("cpu"), "some", b"", lambda: torch.zeros(100, dtype=torch.int64))
    assert len(kept) == 1


def test_sizes_past_two_to_the_31() -> None:
    """Test the last chunk of a tensor of 2^33 elements; only the end has memory."""
    size, start = 2**33 + 100, 2**33
    memory, target = tensors(0, [(100,)])[0], torch.zeros(100, device=DEVICE)
    table = torch.tensor([t.data_ptr() - 4 * start for t in (memory, target)], device=DEVICE)
    lengths = torch.tensor([size], device=DEVICE)
    chunks = torch.tensor([[0, start // launch.CHUNK, 0]], device=DEVICE)
    f32 = operands_of([Row(offset=[memory])])
    assert f32 is not None
    plain = ((0, -1, -1, -1),)
    partials, gram = torch.zeros(1, 1, 1, device=DEVICE), torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    measure[(1,)](
        partials, table, lengths, chunks, 1, 1, 0, 0, 1, DTYPES=f32.dtypes, A=plain, B=plain, SAME=True,
        BLOCK=launch.BLOCK, CHUNK=launch.CHUNK, THREADS=128, num_warps=4,
    )  # fmt: skip
    finish[(1,)](
        gram, partials, torch.tensor([0, 1], device=DEVICE), 1, SLOTS=(0,), ROWS=1, BLOCK=launch.FINISH, num_warps=4
    )
    torch.testing.assert_close(gram.item(), memory.double().square().sum().item(), rtol=1e-6, atol=0.0)
    combine[(1,)](
        table, lengths, chunks, (torch.tensor([[2.0]], device=DEVICE),), 1, 1, DTYPES=f32.dtypes * 2, ROWS=plain,
        SLOTS=(0,), WRITES=((1, False),), RELOAD=False, BLOCK=launch.BLOCK, CHUNK=launch.CHUNK, num_warps=4,
    )  # fmt: skip
    assert torch.equal(target, 2.0 * memory)
