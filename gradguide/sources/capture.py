"""One pass over source data: mean gradient, diagonal Fisher information, mean loss."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.naming import Names, NamesLike, model_names
from gradguide.sharding import check_divided, layout_of, local, several_ranks, spread
from gradguide.sources.gradients import plain_gradients, sharded_gradients

__all__ = ["Batch", "Loss", "measure"]

Batch: TypeAlias = Any
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
Table: TypeAlias = dict[str, Tensor]

_STORAGE = (torch.float32, torch.bfloat16, torch.float64)


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    curvature: bool | Loss,
    dtype: torch.dtype,
    names: NamesLike | None = None,
) -> tuple[Table, Table | None, Table | None, dict[str, Any]]:
    """Mean gradient, Fisher information and anchor by name, and metadata; see ``SourceGradient.capture``."""
    if dtype not in _STORAGE:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _STORAGE))}, found {dtype}")
    parameters = _captured(model, names)
    check_divided(parameters.values())
    total = _Total(list(parameters.values()), square=curvature is not False)
    sharded = any(layout_of(p) is not None for p in total.parameters)
    gradients_of = sharded_gradients if sharded else plain_gradients
    with _undisturbed(model, parameters.values()):
        for index, batch in enumerate(tqdm(batches, desc="capturing source", unit="batch", leave=False)):
            found = gradients_of(loss, model, batch, total.parameters, index)
            squared = found
            if callable(curvature):
                squared = gradients_of(curvature, model, batch, total.parameters, index)
            total.add(found.examples, found.loss, found.gradients, squared.gradients)
    if not sharded:  # else each batch was one of all ranks together
        total.reduce()
    if total.examples == 0:
        raise ValueError("batches must hold at least one example, found none; a generator can be read only once")

    gradient = total.whole(total.mean())
    fisher = anchor = None
    if curvature is not False:
        squares = total.whole(total.fisher(callable(curvature)))
        fisher = dict(zip(parameters, (f.to(dtype) for f in squares), strict=True))
        anchor = dict(zip(parameters, total.whole([local(p.detach()).clone() for p in total.parameters]), strict=True))
    table = dict(zip(parameters, (g.to(dtype) for g in gradient), strict=True))
    _warn_of_zero(table)
    return table, fisher, anchor, _metadata(model, total, curvature)


def _captured(model: nn.Module, names: NamesLike | None) -> Table:
    """Return the trained parameters by name, in the model's order; only those in ``names`` if it is given."""
    trained = {name: p for name, p in model_names(model).items() if p.requires_grad}
    if not trained:
        raise ValueError("the model has no parameter with requires_grad, so there is no gradient to capture")
    if names is None:
        return trained
    chosen = {name: p for p, name in Names(names).of(trained.values()).items()}
    if not chosen:
        raise ValueError(
            f"names hold none of the {len(trained)} parameters of the model that require a gradient (such as "
            f"{next(iter(trained))}): give names of this model, as lora_parameters(model) or model.named_parameters()"
        )
    return chosen


class _Total:
    """Sums over batches, in float32 at least."""

    def __init__(self, parameters: list[Tensor], *, square: bool) -> None:
        self.parameters = parameters
        self.examples = 0
        self.loss = 0.0
        self._pairs = 0
        self._sums = [torch.zeros_like(local(p), dtype=_wide(p), requires_grad=False) for p in parameters]
        self._squares = [torch.zeros_like(s) for s in self._sums] if square else []

    def add(self, count: int, loss: float, gradients: Sequence[Tensor], squared: Sequence[Tensor]) -> None:
        self.examples += count
        self.loss += count * loss
        self._pairs += count * (count - 1)
        for total, gradient in zip(self._sums, gradients, strict=True):
            total.add_(gradient.to(total.dtype), alpha=count)
        if self._squares:
            for total, gradient in zip(self._squares, squared, strict=True):
                total.addcmul_(gradient.to(total.dtype), gradient.to(total.dtype), value=count**2)

    def reduce(self) -> None:
        """Sum over the ranks of ``torch.distributed``, if there are any."""
        if not several_ranks():
            return
        scalars = torch.tensor(
            [self.examples, self.loss, self._pairs], dtype=torch.float64, device=self._sums[0].device
        )
        for tensor in (scalars, *self._sums, *self._squares):
            dist.all_reduce(tensor)
        examples, self.loss, pairs = scalars.tolist()
        self.examples, self._pairs = round(examples), round(pairs)

    def whole(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What lies over ranks as the parameters do, put together on every rank."""
        pairs = zip(parts, self.parameters, strict=True)
        return [spread(part, p).full_tensor() if layout_of(p) is not None else part for part, p in pairs]  # type: ignore[attr-defined]

    def mean(self) -> list[Tensor]:
        return [total / self.examples for total in self._sums]

    def fisher(self, sampled: bool) -> list[Tensor]:
        """Mean square of per-example gradients, from the gradients of batches.

        With N examples in batches of n_b, ``A = sum_b n_b^2 g_b^2 / N`` has the expectation ``F + b mu^2``, where
        ``b = sum_b n_b (n_b - 1) / N`` and mu is the mean gradient, and the square of the mean over all examples has
        the expectation ``mu^2 + (F - mu^2) / N``. Solved for F. Under labels drawn from the model mu is zero for
        every example, and A is F.
        """
        n, b = self.examples, self._pairs / self.examples
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


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


@contextmanager
def _undisturbed(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Eval mode and a private random state inside; each module's own mode and the random state as before after it."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _warn_of_zero(gradient: Table) -> None:
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


def _metadata(model: nn.Module, total: _Total, curvature: bool | Loss) -> dict[str, Any]:
    return {
        "examples": total.examples,
        "loss": total.loss / total.examples,
        "curvature": "true" if callable(curvature) else "empirical" if curvature else None,
        "adapter": _fingerprint(model),
        "versions": {name: _version(name) for name in ("gradguide", "torch", "peft", "transformers")},
    }


def _fingerprint(model: nn.Module) -> str | None:
    """Digest of the model's PEFT configuration, without what says only where it came from."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return None
    told = {
        name: {
            k: v
            for k, v in config.to_dict().items()
            if k not in ("base_model_name_or_path", "revision", "inference_mode")
        }
        for name, config in configs.items()
    }
    text = json.dumps(
        told,
        sort_keys=True,
        default=lambda value: sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value),
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
