"""Compute mean gradient, diagonal Fisher information and mean loss in one pass over source data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.distributed.failures import fail_together
from gradguide.distributed.layouts import (
    all_reduce_over,
    as_dtensor,
    check_divided,
    full,
    is_distributed,
    layout_of,
    local,
)
from gradguide.distributed.ranks import replica_groups
from gradguide.sources.batch_gradient import BatchGradient, batch_gradient
from gradguide.sources.examples import Examples
from gradguide.sources.loss_value import Loss
from gradguide.sources.metadata import metadata_of
from gradguide.sources.side_effects import check_hooks
from gradguide.sources.undisturbed import MODES, undisturbed
from gradguide.utils.checks import check_choice
from gradguide.utils.names import Names, NamesLike, model_names

__all__ = ["Batch", "capture_tables"]

Batch: TypeAlias = Any
Table: TypeAlias = dict[str, Tensor]

_STORAGE = (torch.float32, torch.bfloat16, torch.float64)


def capture_tables(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    curvature: bool | Loss,
    dtype: torch.dtype,
    names: NamesLike | None,
    mode: str,
    examples: Callable[[Batch], int] | None,
) -> tuple[Table, Table | None, Table | None, dict[str, Any]]:
    """Return mean gradient, Fisher information and anchor by name, and metadata; see ``SourceGradient.capture``."""
    if dtype not in _STORAGE:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _STORAGE))}, found {dtype}")
    check_choice("mode", mode, MODES)
    counter = Examples(examples)
    trained = {name: p for name, p in model_names(model).items() if p.requires_grad}
    parameters = _select_parameters(trained, names)
    check_divided(parameters.values())
    check_hooks(trained.values(), {p: name for name, p in trained.items()})
    total = _Sums(parameters, square=curvature is not False)

    def gradient_of(chosen: Loss, batch: Batch, index: int) -> BatchGradient:
        count = partial(counter.of, batch, index)
        return batch_gradient(
            chosen, model, batch, list(parameters.values()), list(trained.values()), index=index, examples=count
        )

    groups = replica_groups(list(model.parameters()))
    with fail_together(model.parameters(), groups[0]), undisturbed(model, mode):
        for index, batch in enumerate(tqdm(batches, desc="capturing source", unit="batch", leave=False)):
            found = gradient_of(loss, batch, index)
            total.add(found, gradient_of(curvature, batch, index) if callable(curvature) else found)
    if not any(layout_of(p) is not None for p in parameters.values()):  # else each batch is reduced over ranks already
        total.reduce(groups)
    if total.examples == 0:
        raise ValueError("batches must hold at least one example, found none; a generator can be read only once")
    unreached = [name for name, reached in zip(parameters, total.reached, strict=True) if not reached]
    _check_reached(unreached, len(parameters))
    gradient = total.gather(total.mean(), dtype)
    fisher = anchor = None
    if curvature is not False:
        fisher = total.gather(total.fisher(callable(curvature)), dtype)
        anchor = total.gather([local(p.detach()).clone() for p in parameters.values()])
    _warn_if_zero({name: g for name, g in gradient.items() if name not in unreached})
    kind = "true" if callable(curvature) else "empirical" if curvature else None
    metadata = metadata_of(model, examples=total.examples, loss=total.loss / total.examples, curvature=kind)
    return gradient, fisher, anchor, metadata


def _select_parameters(trained: Table, names: NamesLike | None) -> Table:
    """Return the trained parameters by name, in the model's order; if ``names`` is given, only those in it."""
    if not trained:
        raise ValueError("the model has no parameter with requires_grad, so there is no gradient to capture")
    if names is None:
        return trained
    chosen = {name: p for p, name in Names(names).of(trained.values()).items()}
    if not chosen:
        raise ValueError(
            f"names hold none of the {len(trained)} parameters of the model that require a gradient (such as "
            f"{next(iter(trained))}): pass names of this model: lora_parameters(model) or model.named_parameters()"
        )
    return chosen


class _Sums:
    """Accumulate sums over batches, in float32 or float64."""

    def __init__(self, parameters: Table, *, square: bool) -> None:
        self._parameters = parameters
        self.examples = 0
        self._squared_examples = 0  # those of the curvature's loss
        self.loss = 0.0
        self.reached = [False] * len(parameters)  # whether autograd produced a gradient in at least one batch
        self._pairs = 0
        self._sums = [torch.zeros_like(local(p), dtype=_sum_dtype(p), requires_grad=False) for p in parameters.values()]
        self._squares = [torch.zeros_like(s) for s in self._sums] if square else []

    def add(self, batch: BatchGradient, squared: BatchGradient) -> None:
        """Add a batch's mean gradient, and the square of ``squared``, the gradient used for the curvature."""
        count, squared_count = batch.examples, squared.examples
        self.examples += count
        self._squared_examples += squared_count
        self.loss += count * batch.loss
        self._pairs += squared_count * (squared_count - 1)
        both = zip(self.reached, batch.reached, squared.reached, strict=True)
        self.reached = [before or (now and too) for before, now, too in both]
        for total, gradient in zip(self._sums, batch.gradients, strict=True):
            total.add_(gradient.to(total.dtype), alpha=count)
        if self._squares:
            for total, gradient in zip(self._squares, squared.gradients, strict=True):
                total.addcmul_(gradient.to(total.dtype), gradient.to(total.dtype), value=squared_count**2)

    def reduce(self, groups: Sequence[Any]) -> None:
        """Sum over the ranks of process groups, if there are several; None is the default group."""
        if not is_distributed():
            return
        scalars = torch.tensor(
            [self.examples, self._squared_examples, self.loss, self._pairs, *self.reached],
            dtype=torch.float64,
            device=self._sums[0].device,
        )
        for tensor in (scalars, *self._sums, *self._squares):
            all_reduce_over(tensor, groups)
        examples, squared_examples, self.loss, pairs, *reached = scalars.tolist()
        self.reached = [ranks > 0 for ranks in reached]
        self.examples, self._squared_examples, self._pairs = round(examples), round(squared_examples), round(pairs)

    def gather(self, parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Table:
        """Gather tensors that are sharded like the parameters, on every rank, by name, in their dtype or ``dtype``."""
        pairs = zip(parts, self._parameters.items(), strict=True)
        return {name: full(as_dtensor(part, p)).to(dtype or part.dtype) for part, (name, p) in pairs}

    def mean(self) -> list[Tensor]:
        """Return the mean gradient of each parameter."""
        return [total / self.examples for total in self._sums]

    def fisher(self, sampled: bool) -> list[Tensor]:
        """Estimate the mean square of per-example gradients F from batch gradients.

        For N examples in batches of n_b, ``A = sum_b n_b^2 g_b^2 / N`` has the expectation ``F + b mu^2``, where
        ``b = sum_b n_b (n_b - 1) / N`` and mu is the mean gradient. The square of the mean over all examples has the
        expectation ``mu^2 + (F - mu^2) / N``. The two equations are solved for F. With labels drawn from the model, mu
        is zero for every example, so F is A.
        """
        n, b = self._squared_examples, self._pairs / self._squared_examples
        scaled = [square / n for square in self._squares]
        if sampled or b == 0:
            return scaled
        if b >= n - 1:
            raise ValueError(
                f"curvature needs at least two batches, found one of {n} examples: give smaller batches (1 to 16 "
                "examples each), or curvature=False"
            )
        return [
            ((a - b * n / (n - 1) * mean.square()) / (1 - b / (n - 1))).clamp_(min=0)
            for a, mean in zip(scaled, self.mean(), strict=True)
        ]


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _check_reached(unreached: list[str], count: int) -> None:
    if not unreached:
        return
    which = f"{', '.join(unreached[:5])}{' and others' if len(unreached) > 5 else ''}"
    causes = (
        "The loss does not use them, or they are inside a reentrant checkpoint whose inputs require no gradient (then "
        "pass use_reentrant=False, or call model.enable_input_require_grads())"
    )
    if len(unreached) == count:
        raise ValueError(f"no batch reached any of the {count} captured parameters ({which}). {causes}")
    warnings.warn(
        f"no batch reached {len(unreached)} of the {count} captured parameters ({which}): autograd gave them no "
        f"gradient. They are stored as zero, so the source does not act on them. {causes}. Leave them out with names=",
        UserWarning,
        stacklevel=4,
    )


def _warn_if_zero(gradient: Table) -> None:
    adapters = [name for name in gradient if ".lora_A." in f".{name}."]
    zero = [name for name in adapters if not gradient[name].any()]
    if zero:
        warnings.warn(
            f"the source gradient of {len(zero)} of {len(adapters)} LoRA A matrices is zero (first: {zero[0]}): LoRA "
            "starts with B = 0, where A has no gradient. Capture after source adaptation, or with adapter weights "
            "loaded.",
            UserWarning,
            stacklevel=4,
        )
