"""Accumulate moments of inputs and output gradients of linear layers in one pass over source text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.distributed.failures import fail_together
from gradguide.distributed.layouts import all_reduce_over, is_distributed
from gradguide.distributed.ranks import replica_groups
from gradguide.sources.base_model import base_of
from gradguide.sources.loss_value import Loss, check_loss
from gradguide.sources.structured.layers import Layer
from gradguide.sources.structured.recorder import Recorder
from gradguide.sources.structured.statistics import LayerStatistics
from gradguide.sources.undisturbed import undisturbed

__all__ = ["capture_statistics"]


def capture_statistics(
    model: nn.Module, batches: Iterable[Any], loss: Loss, layers: Sequence[Layer], rank: int | None
) -> tuple[dict[str, LayerStatistics], dict[str, Any]]:
    """Run the batches and accumulate statistics for factors of rank ``rank``.

    Returns:
        Statistics by layer, and totals.

    Raises:
        ValueError: there is no batch. A loss is not a scalar, is not finite or has no gradient. No batch reached some
            layer, or none gave it a gradient. Factors are not finite.
        RuntimeError: the capture failed on another rank.

    Warns:
        UserWarning: there are fewer sequences than the rank of a pair of factors.
    """
    recorder = Recorder(layers, rank)
    predictions, total, count = 0, 0.0, 0
    groups = replica_groups(list(model.parameters()))
    with fail_together(model.parameters(), groups[0]), _recording(model, recorder):
        base = base_of(model)  # all weights are comparable, because none requires a gradient here
        for index, batch in enumerate(tqdm(batches, desc="capturing source", unit="batch", leave=False)):
            recorder.start()
            value, recorder.predictions = check_loss(loss(model, batch), index)
            # The sum over the predictions: gradients of their mean may underflow in float16.
            (value.float() * (recorder.predictions or 1)).backward()
            mean_loss, number = float(value.detach()), recorder.predictions or 0
            del value  # its graph references the inputs of the layers
            if not math.isfinite(mean_loss) or number < 1:
                raise ValueError(
                    f"batch {index} has a loss of {mean_loss} over {number} predictions; nothing was captured"
                )
            predictions += number
            total += mean_loss * number
            count += 1
        for found in recorder.statistics.values():
            found.flush()
    if is_distributed():
        predictions, total, count = _sum_over_ranks(recorder, predictions, total, count, groups)
    if count == 0:
        raise ValueError("batches must hold at least one batch, found none; a generator can be read only once")
    statistics = recorder.statistics
    unreached = [layer.name for layer in layers if layer.name not in statistics or not statistics[layer.name].reached]
    if unreached:
        raise ValueError(
            f"no batch reached {len(unreached)} of {len(layers)} layers ({', '.join(unreached[:5])}): leave them out "
            f"with modules={_reached(layers, unreached)}, or check that the loss uses them"
        )
    for name, found in statistics.items():
        if not found.finite:
            raise ValueError(
                f"the factors of {name} must be finite, found NaN or Inf: its inputs or gradients are not finite, or "
                "their squares exceed float32"
            )
    _warn_if_few(recorder)
    totals = {"predictions": predictions, "loss": total / predictions, "base": base}
    return statistics, totals


def _reached(layers: Sequence[Layer], unreached: Sequence[str]) -> str:
    """Return ``modules`` for the other layers, if their last names or one pattern tell them apart; else ""."""
    names = [layer.name for layer in layers if layer.name not in unreached]
    last = {name.rpartition(".")[2]: None for name in names}
    if names and not any(name.rpartition(".")[2] in last for name in unreached):
        return repr(list(last))
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    start = "".join(f"{each[0]}." for each in takewhile(lambda each: len(set(each)) == 1, parts))
    return "" if any(name.startswith(start) for name in unreached) else repr(f"{start}*")


def _warn_if_few(recorder: Recorder) -> None:
    """Warn if layers received fewer sequences, and so fewer vectors, than the rank of their factors."""
    sizes = {layer.name: min(layer.shape) for layer in recorder.layers}
    counts = {name: int(found.scalars[2]) for name, found in recorder.statistics.items()}
    few = {n: count for n, count in counts.items() if recorder.rank and count < min(recorder.rank, sizes[n])}
    if few:
        first = next(iter(few))
        warnings.warn(
            f"{len(few)} of {len(counts)} layers received fewer sequences than the rank {recorder.rank} of each pair "
            f"of factors (first: {first}, {few[first]}): the source covers only what these sequences reach. Give more "
            "or shorter texts, or a smaller rank",
            UserWarning,
            stacklevel=4,
        )


def _sum_over_ranks(
    recorder: Recorder, predictions: int, total: float, count: int, groups: Sequence[Any]
) -> tuple[int, float, int]:
    """Sum statistics and totals over the ranks of process groups. Each tensor of a layer is one all-reduce per group.

    A layer that only some ranks reached gets statistics on all of them. Ranks may have no batch.
    """
    device = recorder.layers[0].weight.device
    numbers = torch.tensor([predictions, total, count], dtype=torch.float64, device=device)
    reached = torch.tensor([layer.name in recorder.statistics for layer in recorder.layers], device=device).int()
    all_reduce_over(numbers, groups)
    all_reduce_over(reached, groups)
    for layer, ranks in zip(recorder.layers, reached.tolist(), strict=True):
        for part in recorder.add_layer(layer, device).sums if ranks else ():
            all_reduce_over(part, groups)
    return round(float(numbers[0])), float(numbers[1]), round(float(numbers[2]))


@contextmanager
def _recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Register the hooks and disable gradients of parameters inside; undo everything afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model, "eval"))
        stack.callback(_enable_gradients, trained)
        stack.callback(model.register_forward_pre_hook(recorder.root, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(recorder.output).remove)
        for module in _language_models(model):
            if module is not model:
                stack.callback(module.register_forward_pre_hook(recorder.inner, with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(recorder.embedding).remove)
        for layer in recorder.layers:
            stack.callback(layer.module.register_forward_hook(recorder.hook(layer), with_kwargs=True).remove)
        for p in trained:
            p.requires_grad_(False)
        yield


def _language_models(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules with a configuration, as models of transformers have."""
    if hasattr(module, "config"):
        return [module]
    return [found for child in module.children() for found in _language_models(child)]


def _enable_gradients(parameters: Sequence[Tensor]) -> None:
    for p in parameters:
        p.requires_grad_(True)
