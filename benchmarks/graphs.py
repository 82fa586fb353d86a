"""Capture a step in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Graph"]


class Graph:
    """A step in a CUDA graph: the first steps warm up and capture, later ones replay."""

    WARM_UP = 3

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()
