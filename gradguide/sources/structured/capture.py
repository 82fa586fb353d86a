"""One pass over source text: what each linear layer receives, and what its output is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.distributed.layouts import is_distributed
from gradguide.sources.base_model import base_of
from gradguide.sources.structured.factors import Covariance
from gradguide.sources.structured.layers import Layer
from gradguide.sources.undisturbed import undisturbed

__all__ = ["LayerStatistics", "Loss", "capture_statistics"]

Loss = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, int]"]


class LayerStatistics:
    """Running sums of one layer.

    inputs: sum of ``x x^T`` over tokens; layers with the same input share it.
    outputs: sum of ``d d^T``, d the gradient of the summed loss at the layer's output.
    """

    def __init__(self, layer: Layer, rank: int | None, inputs: Covariance, device: torch.device) -> None:
        self.layer = layer
        self.inputs = inputs
        self.outputs = Covariance(layer.shape[0], rank, device)
        # Number of input rows, and the sum of the output's squares.
        self.scalars = torch.zeros(2, dtype=torch.float64, device=device)


class _Batch:
    """State of the batch in progress."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.seen: dict[int, tuple[Tensor, Covariance]] = {}
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
        """Forget the batch before."""
        self.batch = _Batch()
        self._last_input = None

    def root(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Note the attention mask that the model receives."""
        mask = keywords.get("attention_mask")
        self.batch.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def embedding(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Make the embeddings the start of the graph, since no parameter is."""
        return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_()

    def hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        """Return the forward hook of a layer."""

        def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None  # the first pass of reentrant checkpointing, which is made again
            given = arguments[0]
            started = not output.requires_grad
            if started:
                output = output.detach().requires_grad_()
            found = self._of(layer, given)
            with torch.no_grad():
                mask = self._rows(given)
                if self.shared[layer.name] == layer.name:
                    found.inputs.add(_flat(given, mask))
                rows = _flat(output.detach(), mask)
                found.scalars += torch.stack(
                    [rows.new_tensor(rows.shape[0], dtype=torch.float64), rows.double().square().sum()]
                )
            output.register_hook(lambda gradient: self.batch.gradients.append((found, gradient.detach())))
            return output if started else None

        return record

    def add_gradients(self, predictions: int) -> None:
        """Add what the backward pass gave; the loss was the mean over ``predictions``."""
        for found, gradient in self.batch.gradients:
            # The gradient of the sum; F adds over predictions, so its mean is d d^T / predictions at the end.
            found.outputs.add(gradient.reshape(-1, gradient.shape[-1]).float() * predictions)
        self.batch.gradients.clear()

    def _of(self, layer: Layer, given: Tensor) -> LayerStatistics:
        if layer.name not in self.statistics:
            leader = layer.name
            if self._last_input is not None and self._last_input[0] is given:
                leader = self._last_input[1]
            self.shared[layer.name] = leader
            size, device = layer.shape[1], given.device
            inputs = self.statistics[leader].inputs if leader != layer.name else Covariance(size, self.rank, device)
            self.statistics[layer.name] = LayerStatistics(layer, self.rank, inputs, device)
        if self.shared[layer.name] == layer.name:
            self._last_input = given, layer.name
        return self.statistics[layer.name]

    def _rows(self, given: Tensor) -> Tensor | None:
        mask = self.batch.mask
        if mask is None or given.shape[:-1] != mask.shape:
            return None
        return mask.bool().reshape(-1).to(given.device)


def capture_statistics(
    model: nn.Module, batches: Iterable[Any], loss: Loss, layers: Sequence[Layer], rank: int | None
) -> tuple[dict[str, LayerStatistics], dict[str, str], dict[str, Any]]:
    """Run the batches and return statistics by layer, the layer with whose input each shares, and totals.

    Raises:
        ValueError: there is no batch, a loss is no scalar, is not finite or has no gradient, or a layer was reached by
            no batch.
    """
    recorder = _Recorder(layers, rank)
    predictions, total, count = 0, 0.0, 0
    with _observed(model, recorder):
        base = base_of(model)  # every weight counts, since none is trained here
        for index, batch in enumerate(tqdm(batches, desc="capturing source", unit="batch", leave=False)):
            recorder.start()
            value, number = _checked(loss(model, batch), index)
            value.backward()
            number = number or _predictions(recorder.batch.gradients)
            if not math.isfinite(float(value.detach())) or number < 1:
                raise ValueError(
                    f"batch {index} has a loss of {float(value.detach())} over {number} predictions; nothing was "
                    "captured"
                )
            recorder.add_gradients(number)
            predictions += number
            total += float(value.detach()) * number
            count += 1
    if count == 0:
        raise ValueError("batches must hold at least one batch, found none; a generator can be read only once")
    unreached = [layer.name for layer in layers if layer.name not in recorder.statistics]
    if unreached:
        raise ValueError(
            f"no batch reached {len(unreached)} of {len(layers)} layers ({', '.join(unreached[:5])}): leave them out "
            "with modules=, or check that the loss uses them"
        )
    totals = _reduced(recorder.statistics, recorder.shared, predictions, total)
    return recorder.statistics, recorder.shared, {**totals, "base": base}


def _reduced(
    statistics: Mapping[str, LayerStatistics], shared: Mapping[str, str], predictions: int, total: float
) -> dict[str, Any]:
    """Add up over the ranks of ``torch.distributed``, if there are any."""
    if is_distributed():
        device = next(iter(statistics.values())).scalars.device
        numbers = torch.tensor([predictions, total], dtype=torch.float64, device=device)
        parts = [numbers]
        for name, found in statistics.items():
            parts += [found.outputs.sums, found.outputs.diagonal, found.scalars]
            if shared[name] == name:
                parts += [found.inputs.sums, found.inputs.diagonal]
        for part in parts:
            dist.all_reduce(part)
        predictions, total = round(float(numbers[0])), float(numbers[1])
    return {"predictions": predictions, "loss": total / predictions}


@contextmanager
def _observed(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Observe the layers. Parameters need no gradient inside, and everything is as before afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, "eval"))
        stack.callback(_require, trained)
        stack.callback(model.register_forward_pre_hook(recorder.root, with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(recorder.embedding).remove)
        for layer in recorder.layers:
            stack.callback(layer.module.register_forward_hook(recorder.hook(layer)).remove)
        for p in trained:
            p.requires_grad_(False)
        yield


def _require(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.requires_grad_(True)


def _flat(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows [tokens, n] in float32, those of padding left out."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).float()
    return rows if mask is None else rows[mask]


def _predictions(gradients: Sequence[tuple[LayerStatistics, Tensor]]) -> int:
    """Return how many predictions the loss is a mean over: rows with a gradient at the layer nearest to the loss."""
    if not gradients:
        return 0
    nearest = gradients[0][1]  # the backward pass reaches it first
    return int((nearest.reshape(-1, nearest.shape[-1]) != 0).any(dim=1).sum())


def _checked(value: Any, index: int) -> tuple[Tensor, int]:
    value, number = value if isinstance(value, tuple) and len(value) == 2 else (value, 0)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, or one and a count, found {found} on batch {index}")
    if not value.requires_grad:
        raise ValueError(
            f"the loss of batch {index} has no gradient: it was detached, made under no_grad, or reentrant "
            "checkpointing cut it off (use_reentrant=False)"
        )
    return value.reshape(()), int(number)
