"""Run passes of a whole model outside of a step, and restore its modes, buffers, gradients and random state.

The model is given, so its buffers are listed, and DDP does not synchronize. So gradients are not overwritten, and need
no copies. For an extra pass in a step, without the model, see ``side_effects``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradguide.sources.checkpointing import checkpointing_in_eval
from gradguide.sources.side_effects import RandomState

__all__ = ["MODES", "undisturbed"]

MODES = ("eval", "train", "keep")
# While these are set, DDP all-reduces in each backward pass and broadcasts buffers before a forward pass.
_DDP_FLAGS = ("require_backward_grad_sync", "require_forward_param_sync")


@contextmanager
def undisturbed(model: nn.Module, mode: str) -> Iterator[None]:
    """Set the mode of a model inside, and restore modes, buffers, gradients and torch's random state afterwards.

    DDP does not synchronize inside, so ranks may run different numbers of batches.

    Args:
        model: afterwards, buffers are the same tensors with the same values. Integer matrices are not restored: they
            hold packed weights, and a copy would be large.
        mode: one of ``MODES``: "eval" and "train" call ``model.eval()`` or ``model.train()``; "keep" changes nothing.
            In "eval", layers that have gradient checkpointing on keep it.
    """
    with ExitStack() as stack:
        stack.callback(RandomState(model.parameters()).restore)
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            for name, buffer in _buffers(module):
                stack.callback(_restore, module, name, buffer, buffer.detach().clone())
            for name in _DDP_FLAGS if isinstance(module, DistributedDataParallel) else ():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, False)
        # The first forward pass of DDP after a backward pass replaces the gradients of parameters.
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(setattr, parameter, "grad", parameter.grad)
        if mode != "keep":
            model.train(mode == "train")
        if mode == "eval":
            stack.enter_context(checkpointing_in_eval(model))
        with torch.enable_grad():
            yield


def _restore(module: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    if not torch.equal(buffer, value):  # batch norm writes without increasing ``_version``
        with torch.no_grad():
            buffer.copy_(value)
    module._buffers[name] = buffer


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (name, b)
        for name, b in module._buffers.items()
        if b is not None and not (b.is_inference() or b.is_meta or _is_packed(b))
    ]


def _is_packed(buffer: Tensor) -> bool:
    numbers = buffer.is_floating_point() or buffer.is_complex() or buffer.dtype == torch.bool
    return buffer.dim() > 1 and not numbers
