"""Tables under CUDA: copied without waiting, and safe within graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradguide.ops.triton.device_arrays import DeviceArrayCache
from tests.gpu.training import no_waiting

CUDA = torch.device("cuda", 0)


def numbers(first: int) -> Tensor:
    return torch.arange(first, first + 10)


def get(tables: DeviceArrayCache, first: int) -> Tensor:
    return tables.get(CUDA, "numbers", bytes([first]), lambda: numbers(first))


def test_a_copy_does_not_make_the_host_wait() -> None:
    tables = DeviceArrayCache()
    with no_waiting():
        found = get(tables, 1)
    assert found.tolist() == numbers(1).tolist()


def test_a_graph_repeats_the_copy_and_its_table_is_kept() -> None:
    tables = DeviceArrayCache(budget=100)
    get(tables, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    result = torch.zeros(10, dtype=torch.int64, device=CUDA)
    with torch.cuda.graph(graph):
        result.copy_(get(tables, 2))
    for first in range(3, 20):
        get(tables, first)
    result.zero_()
    graph.replay()
    assert result.tolist() == numbers(2).tolist()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # it is, as nothing was to be captured
def test_a_capture_without_a_step_before_it_says_so() -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="make at least one ordinary step first"), torch.cuda.graph(graph):
        get(DeviceArrayCache(), 1)
