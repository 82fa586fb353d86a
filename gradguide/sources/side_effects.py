"""Keep gradients, buffers and random state during an extra pass in a step, where often only parameters are given.

The model may be unknown, so a hook finds the modules whose buffers may change. The step needs the gradients, which a
backward pass under DDP overwrites in place, so they are copied. Captures have the model: see ``undisturbed``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradguide.distributed.layouts import local
from gradguide.ops.allocate import allocate_contiguous

__all__ = ["RandomState", "check_hooks", "leaves", "preserve_buffers", "preserve_gradients"]


class RandomState:
    """A copy of torch's random state on the host and on the devices of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        devices = {t.device for t in tensors if t.device.type != "cpu"}
        self._host = torch.get_rng_state()
        self._states: list[tuple[Any, tuple[Any, ...], Tensor]] = []
        for device in sorted(devices, key=str):
            module: Any = getattr(torch, device.type, None)  # absent for the meta device
            if hasattr(module, "get_rng_state"):
                which = () if device.type == "mps" else (device.index,)  # torch.mps has one device and no argument
                self._states.append((module, which, module.get_rng_state(*which)))

    def restore(self) -> None:
        """Set torch's random state to the copy."""
        torch.set_rng_state(self._host)
        for module, which, state in self._states:
            module.set_rng_state(state, *which)


@contextmanager
def preserve_buffers(models: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Restore the buffers of every module that runs inside, such as BatchNorm's statistics.

    A global hook registers modules when they are called. Modules inside a graph of torch.compile or a scripted module
    do not call it. Only those in ``models`` are restored.
    """
    kept: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}

    def keep(module: nn.Module, arguments: object) -> None:
        if module not in kept:
            buffers = [(name, b) for name, b in module.named_buffers(recurse=False) if not b.is_inference()]
            kept[module] = {name: (b, b.detach().clone()) for name, b in buffers}

    for model in models:
        for module in model.modules():
            keep(module, ())
    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for module, buffers in kept.items():
                for name, (buffer, value) in buffers.items():
                    buffer.data.copy_(value)  # not a new version: a graph from before the pass may hold the buffer
                    if getattr(module, name, None) is not buffer:
                        module._buffers[name] = buffer


@contextmanager
def preserve_gradients(parameters: Sequence[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Set the gradients of parameters to None inside, and restore them bit for bit afterwards.

    Under DDP, gradients may be views of buffers that another backward pass overwrites. So they are copied. The context
    manager yields the copies by parameter (of a sharded parameter: the local part). Sparse gradients are no such views.
    """
    held = {p: p.grad for p in parameters}
    there = [(p, g, local(g)) for p, g in held.items() if g is not None and g.layout == torch.strided]
    copies = allocate_contiguous([value for _, _, value in there])
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


def leaves(value: Tensor) -> list[Tensor]:
    """Return the leaf tensors of the graph of ``value``, in whose ``grad`` ``value.backward()`` accumulates."""
    if value.grad_fn is None:
        return [value]
    found: list[Tensor] = []
    seen: set[Any] = {value.grad_fn}
    waiting: list[Any] = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        following = [after for after, _ in node.next_functions if after is not None and after not in seen]
        seen.update(following)
        waiting += following
    return found


def check_hooks(parameters: Iterable[Tensor], names: Mapping[Tensor, str]) -> None:
    """Raise if a parameter has a post-accumulate hook, which an extra backward pass would run.

    Such hooks step an optimizer, move gradients elsewhere, or count accumulations.

    Args:
        parameters: parameters that the pass may reach.
        names: names of parameters, for the message; some may be missing.

    Raises:
        RuntimeError: a parameter has such a hook.
    """
    for parameter in parameters:
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"{names.get(parameter, 'a parameter')} has a hook that runs in backward, after its gradient is "
                "accumulated (an optimizer that steps in backward, or offloading). The backward pass of a source would "
                "run it: remove the hooks before, and register them again after it"
            )
