"""Passes that leave a model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["MODES", "undisturbed"]

MODES = ("eval", "train", "keep")
# DDP starts an all-reduce for each backward pass, and sends buffers around before a forward pass, while these are set.
_DDP_FLAGS = ("require_backward_grad_sync", "require_forward_param_sync")


@contextmanager
def undisturbed(model: nn.Module, mode: str) -> Iterator[None]:
    """Run the body with the model in a mode, and afterwards undo what it did.

    Modes, buffers, gradients and torch's random state are then as they were.

    DDP does not synchronize inside: ranks may run different numbers of batches.

    Args:
        model: afterwards each module is in the mode it was in. Buffers are the same tensors with the same values,
            except matrices of integers, which hold packed weights and are not copied.
        mode: one of ``MODES``: that of ``model.eval()``, of ``model.train()``, or each module's own.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [(module, name, b, b.detach().clone()) for module in modules for name, b in _buffers(module)]
    flags = [
        (m, name, getattr(m, name)) for m in modules if isinstance(m, DistributedDataParallel) for name in _DDP_FLAGS
    ]
    # The first forward pass of DDP after a backward pass puts other tensors in the place of gradients.
    gradients = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for wrapper, name, _ in flags:
            setattr(wrapper, name, False)
        if mode != "keep":
            model.train(mode == "train")
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        for module, name, buffer, value in buffers:
            if not torch.equal(buffer, value):  # versions do not tell: batch norm writes without raising them
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer
        for wrapper, name, flag in flags:
            setattr(wrapper, name, flag)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (name, b)
        for name, b in module._buffers.items()
        if b is not None and not (b.is_inference() or b.is_meta or _is_packed(b))
    ]


def _is_packed(buffer: Tensor) -> bool:
    numbers = buffer.is_floating_point() or buffer.is_complex() or buffer.dtype == torch.bool
    return buffer.dim() > 1 and not numbers
