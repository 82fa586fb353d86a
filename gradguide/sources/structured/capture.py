"""Accumulate input covariances and output-gradient covariances of linear layers in one pass over source text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.distributed.layouts import is_distributed, layout_of
from gradguide.ops.tensors import wide_dtype
from gradguide.sources.base_model import base_of
from gradguide.sources.structured.factors import Covariance
from gradguide.sources.structured.layers import Layer
from gradguide.sources.undisturbed import undisturbed

__all__ = ["LayerStatistics", "Loss", "capture_statistics"]

Loss = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, int]"]


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


class _Recorder:
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
        """Store the attention mask from the model's arguments."""
        mask = keywords.get("attention_mask")
        self.batch.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def embedding(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Make the embeddings require a gradient, because no parameter does."""
        return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_()

    def hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        """Return the forward hook of a layer."""

        def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None  # the first pass of reentrant checkpointing, which is repeated with gradients
            layer_input = arguments[0]
            _check_whole(layer, layer_input, output)
            started = not output.requires_grad
            if started:
                output = output.detach().requires_grad_()
            found = self._statistics_of(layer, layer_input)
            with torch.no_grad():
                tokens = self._rows(layer_input)
                if self.shared[layer.name] == layer.name:
                    found.inputs.add(_flat(layer_input, tokens))
                rows = _flat(output.detach(), tokens)
                found.scalars[0] += rows.shape[0]
                found.scalars[1] += torch.linalg.vector_norm(rows, dtype=found.scalars.dtype).square()
            output.register_hook(lambda gradient: self.batch.gradients.append((found, gradient.detach())))
            return output if started else None

        return record

    def add_gradients(self, predictions: int) -> None:
        """Add the output gradients of the backward pass. The loss was the mean over ``predictions``."""
        for found, gradient in self.batch.gradients:
            # Gradient of the summed loss. The sum of d d^T is divided by the number of predictions at the end.
            found.outputs.add(gradient.reshape(-1, gradient.shape[-1]), weight=float(predictions) ** 2)
        self.batch.gradients.clear()

    def _statistics_of(self, layer: Layer, layer_input: Tensor) -> LayerStatistics:
        if layer.name not in self.statistics:
            leader = layer.name
            if self._last_input is not None and self._last_input[0] is layer_input:
                leader = self._last_input[1]
            self.add_layer(layer, leader, layer_input.device)
        if self.shared[layer.name] == layer.name:
            self._last_input = layer_input, layer.name
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


def capture_statistics(
    model: nn.Module, batches: Iterable[Any], loss: Loss, layers: Sequence[Layer], rank: int | None
) -> tuple[dict[str, LayerStatistics], dict[str, str], dict[str, Any]]:
    """Run the batches and accumulate statistics.

    Returns:
        Statistics by layer; for each layer, the name of the layer whose input statistics it shares (or its own); and
        totals.

    Raises:
        ValueError: there is no batch. A loss is not a scalar, is not finite or has no gradient. No batch reached some
            layer. Factors are not finite.

    Warns:
        UserWarning: there are fewer tokens than the rank.
    """
    recorder = _Recorder(layers, rank)
    predictions, total, count = 0, 0.0, 0
    with _recording(model, recorder):
        base = base_of(model)  # all weights are comparable, because none requires a gradient here
        for index, batch in enumerate(tqdm(batches, desc="capturing source", unit="batch", leave=False)):
            recorder.start()
            value, number = _check_loss(loss(model, batch), index)
            value.backward()
            mean_loss = float(value.detach())
            number = number or _count_predictions(recorder.batch.gradients)
            if not math.isfinite(mean_loss) or number < 1:
                raise ValueError(
                    f"batch {index} has a loss of {mean_loss} over {number} predictions; nothing was captured"
                )
            recorder.add_gradients(number)
            predictions += number
            total += mean_loss * number
            count += 1
    if is_distributed():
        predictions, total, count = _sum_over_ranks(recorder, predictions, total, count)
    if count == 0:
        raise ValueError("batches must hold at least one batch, found none; a generator can be read only once")
    unreached = [layer.name for layer in layers if layer.name not in recorder.statistics]
    if unreached:
        raise ValueError(
            f"no batch reached {len(unreached)} of {len(layers)} layers ({', '.join(unreached[:5])}): leave them out "
            "with modules=, or check that the loss uses them"
        )
    for name, found in recorder.statistics.items():
        parts = (found.inputs.sums, found.outputs.sums, found.inputs.diagonal, found.outputs.diagonal, found.scalars)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError(
                f"the factors of {name} must be finite, found NaN or Inf: its inputs or gradients are not finite, or "
                "their squares exceed float32"
            )
    _warn_if_few(recorder)
    totals = {"predictions": predictions, "loss": total / predictions, "base": base}
    return recorder.statistics, recorder.shared, totals


def _warn_if_few(recorder: _Recorder) -> None:
    """Warn if layers received fewer tokens than the rank of their factors."""
    rank = recorder.rank
    tokens = {name: int(found.scalars[0]) for name, found in recorder.statistics.items()}
    few = {n: t for n, t in tokens.items() if rank is not None and t < min(rank, recorder.statistics[n].inputs.size)}
    if few:
        first = next(iter(few))
        warnings.warn(
            f"{len(few)} of {len(tokens)} layers received fewer tokens than the rank {rank} of their factors (first: "
            f"{first}, {few[first]}): the source covers only what these tokens reach. Give more source text, or a "
            "smaller rank",
            UserWarning,
            stacklevel=4,
        )


def _sum_over_ranks(recorder: _Recorder, predictions: int, total: float, count: int) -> tuple[int, float, int]:
    """Sum statistics and totals over the ranks of ``torch.distributed``. Each tensor of a layer is one all-reduce.

    A layer that only some ranks reached gets statistics on all of them. Ranks may have no batch.

    Raises:
        ValueError: on some ranks a layer shares its input with other layers than on others.
    """
    device = recorder.layers[0].weight.device
    numbers = torch.tensor([predictions, total, count], dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    # The position of the layer whose input statistics each layer shares; both extremes over the ranks.
    places = {layer.name: place for place, layer in enumerate(recorder.layers)}
    nowhere = len(places)
    least = [places.get(recorder.shared.get(name, ""), nowhere) for name in places]
    most = [-place if place < nowhere else 1 for place in least]
    extremes = torch.tensor([least, most], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
    leaders = list(zip(recorder.layers, *extremes.tolist(), strict=True))
    for layer, first, last in sorted(leaders, key=lambda each: places[each[0].name] != each[1]):  # shared inputs first
        if first == nowhere:
            continue
        if first != -last:
            raise ValueError(
                f"{layer.name} shares its input with other layers on some ranks than on others: run the same model on "
                "all ranks"
            )
        recorder.add_layer(layer, recorder.layers[first].name, device)
        found = recorder.statistics[layer.name]
        parts = [found.outputs.sums, found.outputs.diagonal, found.scalars]
        if first == places[layer.name]:
            parts += [found.inputs.sums, found.inputs.diagonal]
        for part in parts:
            dist.all_reduce(part)
    return round(float(numbers[0])), float(numbers[1]), round(float(numbers[2]))


@contextmanager
def _recording(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Register the hooks and disable gradients of parameters inside; undo everything afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, "eval"))
        stack.callback(_enable_gradients, trained)
        stack.callback(model.register_forward_pre_hook(recorder.root, with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(recorder.embedding).remove)
        for layer in recorder.layers:
            stack.callback(layer.module.register_forward_hook(recorder.hook(layer)).remove)
        for p in trained:
            p.requires_grad_(False)
        yield


def _enable_gradients(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.requires_grad_(True)


def _check_whole(layer: Layer, layer_input: Tensor, output: Tensor) -> None:
    """Raise if this rank computes a part of the layer only, as under tensor parallelism."""
    sizes = int(output.shape[-1]), int(layer_input.shape[-1])
    if sizes != layer.shape or layout_of(output) is not None or layout_of(layer_input) is not None:
        raise ValueError(
            f"this rank computes outputs and inputs of sizes {sizes} of {layer.name}, whose sizes are {layer.shape}: "
            "capture under tensor parallelism is not supported. Capture with whole layers (one process, DDP or FSDP2) "
            "and load the file"
        )


def _flat(tensor: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the rows [tokens, n] in float32, of all tokens or those with the given indices."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return (rows if tokens is None else rows.index_select(0, tokens)).float()


def _count_predictions(gradients: Sequence[tuple[LayerStatistics, Tensor]]) -> int:
    """Return the number of predictions: rows with a nonzero gradient at the layer nearest to the loss."""
    if not gradients:
        return 0
    nearest = gradients[0][1]  # the backward pass reaches it first
    return int((nearest.reshape(-1, nearest.shape[-1]) != 0).any(dim=1).sum())


def _check_loss(value: Any, index: int) -> tuple[Tensor, int]:
    value, number = value if isinstance(value, tuple) and len(value) == 2 else (value, 0)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, or one and a count, found {found} on batch {index}")
    if not value.requires_grad:
        raise ValueError(
            f"the loss of batch {index} has no gradient: it was detached, computed under no_grad, or cut "
            "off by reentrant checkpointing (pass use_reentrant=False)"
        )
    return value.reshape(()), int(number)
