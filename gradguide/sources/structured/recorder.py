"""Hooks that record what linear layers receive and what their outputs are worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import layout_of
from gradguide.ops.tensors import wide_dtype
from gradguide.sources.structured.factors import Covariance
from gradguide.sources.structured.layers import Layer

__all__ = ["LayerStatistics", "Recorder"]


class LayerStatistics:
    """Running sums of one layer.

    inputs: sum of ``x x^T`` over tokens. Layers with the same input share it.
    outputs: sum of ``d d^T``, where d is the gradient of the summed loss at the layer's output.
    """

    def __init__(self, layer: Layer, rank: int | None, inputs: Covariance, device: torch.device) -> None:
        self.inputs = inputs
        self.outputs = Covariance(layer.shape[0], rank, device)
        # Number of input rows, and the sum of squares of the output.
        self.scalars = torch.zeros(2, dtype=wide_dtype(device), device=device)


class _Batch:
    """State of the batch in progress."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        # Indices of the tokens in the mask by device, None if all are. Found once, because that synchronizes.
        self.tokens: dict[torch.device, Tensor | None] = {}
        self.gradients: list[tuple[LayerStatistics, Tensor]] = []
        # Number of inputs of each layer, and the layers that had one before the backward pass.
        self.calls: Counter[str] = Counter()
        self.reached: set[str] = set()


class Recorder:
    """Hooks that add a batch's inputs and output gradients to the layers' statistics."""

    def __init__(self, layers: Sequence[Layer], rank: int | None) -> None:
        self.layers = layers
        self.rank = rank
        self.statistics: dict[str, LayerStatistics] = {}
        self.shared: dict[str, str] = {}
        self.batch = _Batch()
        self._last_input: tuple[Tensor, str] | None = None

    def start(self) -> None:
        """Clear the state of the previous batch."""
        self.batch = _Batch()
        self._last_input = None

    def root(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Store the attention mask from the model's arguments.

        Raises:
            ValueError: an encoder-decoder has padding. Its mask is that of the encoder, not of the decoder's layers.
        """
        mask = keywords.get("attention_mask")
        two_stacks = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        if two_stacks and isinstance(mask, Tensor) and not bool(mask.all()):
            raise ValueError(
                "capture from an encoder-decoder needs batches without padding, found an attention mask with 0"
            )
        self.batch.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.batch.tokens = {}

    def embedding(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Make the embeddings require a gradient, because no parameter does."""
        return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_()

    def hook(self, layer: Layer) -> Callable[..., Tensor | None]:
        """Return the forward hook of a layer, for ``register_forward_hook(hook, with_kwargs=True)``."""

        def record(
            module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Tensor
        ) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None  # the first pass of reentrant checkpointing, which is repeated with gradients
            layer_input = arguments[0] if arguments else next(iter(keywords.values()))
            _check_whole(layer, layer_input, output)
            started = not output.requires_grad
            if started:
                output = output.detach().requires_grad_()
            if torch._C._current_graph_task_id() == -1:
                self.batch.reached.add(layer.name)
            elif layer.name in self.batch.reached:
                return output if started else None  # repeated by checkpointing that is not reentrant
            found = self._statistics_of(layer, layer_input)
            with torch.no_grad():
                tokens = self._rows(layer_input)
                if self.shared[layer.name] == layer.name:
                    found.inputs.add(_flat(layer_input, tokens))
                rows = _flat(output, tokens)
                found.scalars[0] += rows.shape[0]
                found.scalars[1] += torch.linalg.vector_norm(rows, dtype=found.scalars.dtype).square()
            output.register_hook(lambda gradient: self.batch.gradients.append((found, gradient.detach())))
            return output if started else None

        return record

    def add_gradients(self, predictions: int) -> None:
        """Add the output gradients of the backward pass. The loss was the mean over ``predictions``.

        Raises:
            ValueError: a layer shared its input with another one in some calls only.
        """
        for found, gradient in self.batch.gradients:
            # Gradient of the summed loss. The sum of d d^T is divided by the number of predictions at the end.
            found.outputs.add(gradient.reshape(-1, gradient.shape[-1]), weight=float(predictions) ** 2)
        self.batch.gradients.clear()
        for name, leader in self.shared.items():
            if self.batch.calls[name] != self.batch.calls[leader]:
                raise _shared_in_part(name, leader)

    def _statistics_of(self, layer: Layer, layer_input: Tensor) -> LayerStatistics:
        if layer.name not in self.statistics:
            leader = layer.name
            if self._last_input is not None and self._last_input[0] is layer_input:
                leader = self._last_input[1]
            self.add_layer(layer, leader, layer_input.device)
        self.batch.calls[layer.name] += 1
        leader = self.shared[layer.name]
        if leader == layer.name:
            self._last_input = layer_input, layer.name
        elif self._last_input is None or self._last_input[0] is not layer_input:
            raise _shared_in_part(layer.name, leader)
        return self.statistics[layer.name]

    def add_layer(self, layer: Layer, leader: str, device: torch.device) -> None:
        """Create the statistics of a layer that has none. It shares the input statistics of ``leader``."""
        if layer.name in self.statistics:
            return
        self.shared[layer.name] = leader
        shares = leader != layer.name
        inputs = self.statistics[leader].inputs if shares else Covariance(layer.shape[1], self.rank, device)
        self.statistics[layer.name] = LayerStatistics(layer, self.rank, inputs, device)

    def _rows(self, layer_input: Tensor) -> Tensor | None:
        mask, tokens, device = self.batch.mask, self.batch.tokens, layer_input.device
        if mask is None or layer_input.shape[:-1] != mask.shape:
            return None
        if device not in tokens:
            used = mask.reshape(-1).nonzero().squeeze(1)
            tokens[device] = None if len(used) == mask.numel() else used.to(device)
        return tokens[device]


def _flat(tensor: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the rows [tokens, n] in float32, of all tokens or those with the given indices."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return (rows if tokens is None else rows.index_select(0, tokens)).float()


def _check_whole(layer: Layer, layer_input: Tensor, output: Tensor) -> None:
    """Raise if this rank computes a part of the layer only, as under tensor parallelism."""
    sizes = int(output.shape[-1]), int(layer_input.shape[-1])
    if sizes != layer.shape or layout_of(output) is not None or layout_of(layer_input) is not None:
        raise ValueError(
            f"this rank computes outputs and inputs of sizes {sizes} of {layer.name}, whose sizes are {layer.shape}: "
            "capture under tensor parallelism is not supported. Capture with whole layers (one process, DDP or FSDP2) "
            "and load the file"
        )


def _shared_in_part(name: str, leader: str) -> ValueError:
    return ValueError(
        f"{name} has the input of {leader} in some calls and not in others, so they cannot share its covariance: "
        "capture them apart, with modules=, and pass both sources to Alignment"
    )
