"""Hooks that record the inputs of linear layers and the gradients at their outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import layout_of
from gradguide.sources.structured.layers import Layer
from gradguide.sources.structured.statistics import LayerStatistics, Mask

__all__ = ["Recorder"]


class Recorder:
    """Hooks that add a batch's inputs and output gradients to the layers' statistics.

    The input of a layer is referenced until the graph of the batch's loss is freed.

    predictions: number of predictions in the batch. If it is set before the backward pass, that pass is of the summed
        loss. If it is None, the pass is of the mean, and the rows with a nonzero gradient at the logits are counted.
    """

    def __init__(self, layers: Sequence[Layer], rank: int | None) -> None:
        self.layers = layers
        self.rank = rank
        self.statistics: dict[str, LayerStatistics] = {}
        self.start()

    def start(self) -> None:
        """Clear the state of the previous batch."""
        self.predictions: int | None = None
        # Factor of the gradients.
        self._scale = 1
        # Number of forward passes of the model that have a gradient, and whether they differ in sizes or masks.
        self._passes, self._differ = 0, False
        # Whether a model inside the captured one was called in this pass.
        self._inner = False
        # Sequences and tokens of the model's input, and the mask of the tokens that count, None if all do.
        self._grid: tuple[int, ...] = ()
        self._mask: Mask | None = None
        # The layer that ran last with its output, and the layer whose output is the model's.
        self._last: tuple[str, Tensor | None] = "", None
        self._head = ""
        # Layers with an input before the backward pass.
        self._reached: set[str] = set()

    def root(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Store the sizes and the attention mask of the model's input."""
        before = self._grid, self._mask
        self._inner = False
        self._store(module, arguments, keywords)
        if torch.is_grad_enabled():
            self._differ |= self._passes > 0 and (*before, self._mask) != (self._grid, None, None)
            self._passes += 1

    def _store(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Store them, and raise ValueError if an encoder-decoder has padding: each mask is that of one part only."""
        named = _by_name(module, arguments, keywords)
        mask = named.get("attention_mask")
        configs = (each.config for each in module.modules() if hasattr(each, "config"))  # the model may be in a wrapper
        two_stacks = getattr(next(configs, None), "is_encoder_decoder", False)
        masks = [mask, named.get("decoder_attention_mask")]
        if two_stacks and any(isinstance(each, Tensor) and not bool(each.all()) for each in masks):
            raise ValueError(
                "capture from an encoder-decoder needs batches without padding, found an attention mask with 0"
            )
        given = [named.get("input_ids"), named.get("inputs_embeds"), *arguments[:1]]
        inputs = [each for each in given if isinstance(each, Tensor) and each.dim() > 1]
        self._grid = tuple(inputs[0].shape[:2]) if inputs else ()
        self._mask = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._grid = tuple(mask.shape)
            self._mask = Mask.of(mask)

    def inner(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Store the same for a language model inside the captured model, whose own arguments may hide them."""
        seen = self._inner
        before = self._grid, self._mask
        self._inner = True
        self._store(module, arguments, keywords)
        if torch.is_grad_enabled():
            self._differ |= seen and (*before, self._mask) != (self._grid, None, None)

    def output(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Count the predictions of the backward pass at the model's logits, or its output, if they are not given."""
        logits = _logits_of(output)
        if logits is None or not logits.requires_grad:
            return
        name, last = self._last
        if logits is last:
            self._head = name  # hooks on one tensor run in the order of their registration
        logits.register_hook(self._count)

    def _count(self, gradient: Tensor) -> None:
        if self.predictions is None and self._passes == 1:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            self.predictions = self._scale = int((rows != 0).any(dim=1).sum())

    def embedding(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Make the embeddings require a gradient, because no parameter does."""
        return output if output.requires_grad or not torch.is_grad_enabled() else _with_gradient(output)

    def hook(self, layer: Layer) -> Callable[..., Tensor | None]:
        """Return the forward hook of a layer, for ``register_forward_hook(hook, with_kwargs=True)``."""

        def record(
            module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Tensor
        ) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None  # the first pass of reentrant checkpointing, which is repeated with gradients
            if self._passes == 0:
                raise ValueError(
                    f"the loss ran {layer.name} without a call of the model that is captured, so the padding is not "
                    "known: call model(...) itself in the loss, or capture the module that the loss calls"
                )
            layer_input = arguments[0] if arguments else next(iter(keywords.values()))
            _check_whole(layer, layer_input, output)
            if layer_input.numel() == 0:
                return None  # an expert that received no token
            started = not output.requires_grad
            if started:
                output = _with_gradient(output)
            if torch._C._current_graph_task_id() == -1:
                self._reached.add(layer.name)
            elif layer.name in self._reached:
                return output if started else None  # repeated by checkpointing that is not reentrant
            elif self._differ:
                raise ValueError(
                    "the loss calls the model with several sizes or masks per batch under reentrant checkpointing, "
                    "which repeats each layer without them: pass use_reentrant=False"
                )
            self._record(layer, layer_input.detach(), output)
            return output if started else None

        return record

    def add_layer(self, layer: Layer, device: torch.device) -> LayerStatistics:
        """Return the statistics of a layer. Create them on the first call."""
        if layer.name not in self.statistics:
            self.statistics[layer.name] = LayerStatistics(layer, self.rank, device)
        return self.statistics[layer.name]

    def _record(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        found = self.add_layer(layer, output.device)
        shape, output_shape, version = x.shape[:-1], output.shape, _version(x)
        grid = _grid(shape, self._grid)
        mask = None if self._mask is None or grid != self._mask.kept.shape else self._mask.to(x.device)

        exchanged = shape[:2] != grid and len(shape) == 2

        def sequences(tensor: Tensor) -> Tensor:
            """Return [..., n] as [sequences, tokens, n]."""
            if tensor.dim() == 3 and not exchanged:
                return tensor  # without a view, whose call takes as long as a launch
            return (tensor.transpose(0, 1) if exchanged else tensor).reshape(*grid, -1)

        @torch.no_grad()
        def add(gradient: Tensor) -> None:
            if _version(x) != version:
                raise ValueError(
                    f"the input of {layer.name} was changed in place after the layer: replace the operation by one "
                    "that is not in place, or leave the layer out with modules="
                )
            if layer.name == self._head:
                self._count(gradient)
            if self.predictions is None:
                why = (
                    "calls the model more than once per batch"
                    if self._passes > 1
                    else "does not use the model's logits"
                )
                raise ValueError(
                    f"the loss {why}, so its predictions cannot be counted: let it return the mean and the number of "
                    "predictions in it"
                )
            gradient = gradient if gradient.shape == output_shape else gradient.reshape(output_shape)
            summed = gradient if self._scale == 1 else gradient.float() * self._scale
            found.add(sequences(x), sequences(summed), mask)

        with torch.no_grad():
            found.add_outputs(sequences(output), mask)
        self._last = layer.name, output
        _whole_view(output).register_hook(add)


def _by_name(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a model by name, also those given by position, to the model or to a wrapper of it."""
    try:
        signature = inspect.signature(module.forward)
        if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):  # DDP, torch.compile or PEFT
            get = getattr(module, "get_base_model", None)
            inner = get() if callable(get) else getattr(module, "_orig_mod", getattr(module, "module", None))
            return _by_name(inner, arguments, keywords) if isinstance(inner, nn.Module) else keywords
        return {**signature.bind_partial(*arguments, **keywords).arguments, **keywords}
    except (TypeError, ValueError):
        return keywords


def _logits_of(output: Any) -> Tensor | None:
    """Return the logits [..., classes] of a model's output, or the output if it is a tensor; else None."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, tuple):
        found = next((each for each in found if isinstance(each, Tensor) and each.dim() > 1), None)
    return found if isinstance(found, Tensor) and found.dim() > 0 else None


def _with_gradient(output: Tensor) -> Tensor:
    """Return the output as the start of a graph. It is no leaf, so the model may write it in place."""
    return output.detach().requires_grad_().clone()


def _whole_view(output: Tensor) -> Tensor:
    """Return the tensor of which the output is a view with the same elements, else the output.

    ``nn.Linear`` returns such views. An operation in place on a view replaces its node in the graph, with all hooks.
    """
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _grid(shape: torch.Size, model: tuple[int, ...]) -> tuple[int, int]:
    """Return the numbers of sequences and tokens of a layer's input [*shape, n].

    Args:
        model: those of the model's input. They are used if the layer has the same tokens, flattened or transposed.
            Other inputs are [sequences, ..., n]. Rows [m, n] are sequences of one token, as those of an expert.
    """
    if len(model) == 2 and (shape == (model[0] * model[1],) or shape == model[::-1]):
        return model[0], model[1]
    count = shape[0] if shape else 1
    return count, shape.numel() // max(count, 1)


def _check_whole(layer: Layer, layer_input: Tensor, output: Tensor) -> None:
    """Raise if the layer is not linear, or this rank computes a part of it only, as under tensor parallelism."""
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{layer.name} ({type(layer.linear).__name__}) must return one tensor, found {type(output).__name__}: it "
            "is no linear layer, so leave it out with modules="
        )
    sizes = int(output.shape[-1]), int(layer_input.shape[-1])
    if sizes != layer.shape or layout_of(output) is not None or layout_of(layer_input) is not None:
        raise ValueError(
            f"this rank computes outputs and inputs of sizes {sizes} of {layer.name}, whose sizes are {layer.shape}: "
            "capture under tensor parallelism is not supported. Capture with whole layers (one process, DDP or FSDP2) "
            "and load the file"
        )
