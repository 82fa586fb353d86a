"""Passes beside the one that trains: under a random state of their own, and without a trace in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradguide.ops.pack import lay_out
from gradguide.sharding import local

__all__ = ["Randomness", "buffers_kept", "gradients_kept"]


class Randomness:
    """torch's random state on the host and on the CUDA devices of some tensors, as it is now."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self._host = torch.get_rng_state()
        self._states = [torch.cuda.get_rng_state(index) for index in self._devices]

    def restore(self) -> None:
        """Make it the state again."""
        torch.set_rng_state(self._host)
        for index, state in zip(self._devices, self._states, strict=True):
            torch.cuda.set_rng_state(state, index)


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Buffers of every module that runs within are afterwards as they were before: BatchNorm's statistics and the like.

    An optimizer does not know the model, so modules are met as they are called. Those inside a graph that torch.compile
    or a scripted module made are not.
    """
    kept: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}

    def keep(module: nn.Module, arguments: object) -> None:
        if module not in kept:
            kept[module] = {name: (b, b.detach().clone()) for name, b in module._buffers.items() if b is not None}

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for module, buffers in kept.items():
                for name, (buffer, value) in buffers.items():
                    buffer.copy_(value)
                    module._buffers[name] = buffer


@contextmanager
def gradients_kept(parameters: Sequence[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Parameters are without gradients within, and afterwards have those that they had before, bit for bit.

    Copies are made, which the body is given by parameter (of a shard: this rank's part): under DDP gradients may be
    views of buffers that another backward pass fills anew.
    """
    held = {p: p.grad for p in parameters}
    there = [(p, g, local(g)) for p, g in held.items() if g is not None]
    copies = lay_out([value for _, _, value in there])
    if there:
        torch._foreach_copy_(copies, [value for _, _, value in there])
    try:
        for parameter in parameters:
            parameter.grad = None
        yield {p: copy for (p, _, _), copy in zip(there, copies, strict=True)}
    finally:
        for parameter, gradient in held.items():
            parameter.grad = gradient
        if there:
            with torch.no_grad():
                torch._foreach_copy_([value for _, _, value in there], copies)
