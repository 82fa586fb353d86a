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

from gradguide.distributed.layouts import is_distributed
from gradguide.sources.base_model import base_of
from gradguide.sources.structured.layers import Layer
from gradguide.sources.structured.recorder import LayerStatistics, Recorder
from gradguide.sources.undisturbed import undisturbed

__all__ = ["LayerStatistics", "Loss", "capture_statistics"]

Loss = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, int]"]


def capture_statistics(
    model: nn.Module, batches: Iterable[Any], loss: Loss, layers: Sequence[Layer], rank: int | None
) -> tuple[dict[str, LayerStatistics], dict[str, str], dict[str, Any]]:
    """Run the batches and accumulate statistics.

    Returns:
        Statistics by layer; for each layer, the name of the layer whose input statistics it shares (or its own); and
        totals.

    Raises:
        ValueError: there is no batch. A loss is not a scalar, is not finite or has no gradient. No batch reached some
            layer. Factors are not finite. Two layers have the same input in some calls only.

    Warns:
        UserWarning: there are fewer tokens than the rank.
    """
    recorder = Recorder(layers, rank)
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


def _warn_if_few(recorder: Recorder) -> None:
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


def _sum_over_ranks(recorder: Recorder, predictions: int, total: float, count: int) -> tuple[int, float, int]:
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
def _recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
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
            stack.callback(layer.module.register_forward_hook(recorder.hook(layer), with_kwargs=True).remove)
        for p in trained:
            p.requires_grad_(False)
        yield


def _enable_gradients(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.requires_grad_(True)


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
