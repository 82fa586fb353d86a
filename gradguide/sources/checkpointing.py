"""Keep gradient checkpointing on in eval mode, in which models of transformers turn it off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointing_in_eval"]

Function = Callable[..., Any]


@contextmanager
def checkpointing_in_eval(model: nn.Module) -> Iterator[None]:
    """Recompute the layers that have gradient checkpointing on, although they are in eval mode.

    Models of transformers checkpoint only if a module is in training mode, and then dropout is on. Inside, the forward
    of each such layer calls the checkpointing function that the model was given, so that no mode changes. The models
    create no cache of keys and values, because a recomputed layer would add to it twice.

    A call runs without checkpointing if it gets a cache, or if no input requires a gradient. In the latter case
    reentrant checkpointing would give the layer's parameters no gradient.
    """
    layers = dict(_checkpointed(model))
    configs = [getattr(module, "config", None) for module in model.modules()] if layers else []
    with ExitStack() as stack:
        for config in configs:
            if getattr(config, "use_cache", False) is True:
                stack.callback(setattr, config, "use_cache", True)
                config.use_cache = False  # type: ignore[union-attr]
        for layer, function in layers.items():
            stack.callback(_restore, layer, vars(layer).get("forward"))
            vars(layer)["forward"] = _recomputed(layer.forward, function)
        yield


def _checkpointed(model: nn.Module) -> Iterator[tuple[nn.Module, Function]]:
    """Return each layer with gradient checkpointing on, and its checkpointing function.

    transformers marks the layers themselves since version 4.53. Before, and in code of other authors, it marks the
    module whose lists hold the layers.
    """
    for module in model.modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None) or partial(checkpoint, use_reentrant=False)
        if _marks_itself(module):
            yield module, function
            continue
        for child in module.children():
            for layer in child if isinstance(child, nn.ModuleList) else ():
                if not _marks_itself(layer):
                    yield layer, function


def _marks_itself(module: nn.Module) -> bool:
    return any(each.__name__ == "GradientCheckpointingLayer" for each in type(module).__mro__)


def _recomputed(forward: Function, function: Function) -> Function:
    def call(*arguments: Any, **keywords: Any) -> Any:
        given = [*arguments, *keywords.values()]
        if not torch.is_grad_enabled() or not any(map(_needs_gradient, given)) or any(map(_is_cache, given)):
            return forward(*arguments, **keywords)
        # Reentrant checkpointing returns gradients of positional arguments only.
        moved = [name for name, value in keywords.items() if _needs_gradient(value)]
        fixed = {name: value for name, value in keywords.items() if name not in moved}

        def run(*values: Any) -> Any:
            named = dict(zip(moved, values[len(arguments) :], strict=True))
            return forward(*values[: len(arguments)], **fixed, **named)

        return function(run, *arguments, *(keywords[name] for name in moved))

    return call


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def _restore(layer: nn.Module, forward: Function | None) -> None:
    if forward is None:
        del vars(layer)["forward"]
    else:
        vars(layer)["forward"] = forward
