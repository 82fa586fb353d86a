"""Check a state dict before anything is loaded.

GradGuide's own entries are checked fully. The base's entries are checked only if it is one of torch's own
optimizers and keeps them in the shape of the parameter. Other optimizers use these names for other shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradguide.base_checks import check_differentiable
from gradguide.checkpoint import entries
from gradguide.checkpoint.entries import COUNTERS, DIRECTION, HEAD
from gradguide.distributed.layouts import local

__all__ = [
    "check_base_entry",
    "check_counters",
    "check_direction",
    "check_groups",
    "check_own_keys",
    "read_counters",
]

# The square of a large gradient can overflow. Infinity then gives an evidence of 0.
_UNBOUNDED = frozenset({"square"})

# Torch's loader does not check shapes: the error would appear in a later step.
_ELEMENTWISE = frozenset(
    {
        "acc_delta",
        "ax",
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum_buffer",
        "prev",
        "square_avg",
        "step_size",
        "sum",
    }
)


def check_groups(state: object, base: Optimizer) -> None:
    """Raise ValueError unless ``state`` has the form of a state dict, with the param groups of ``base``."""
    try:
        saved = [list(group["params"]) for group in state["param_groups"]]  # type: ignore[index]
        hash(tuple(key for keys in saved for key in keys))
        state["state"].items()  # type: ignore[index]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not the state dict of an optimizer: {error!r}") from error
    check_differentiable(state["param_groups"])  # type: ignore[index]
    present = [len(group["params"]) for group in base.param_groups]
    if len(saved) != len(present):
        raise ValueError(
            f"the state has {len(saved)} param groups, the optimizer has {len(present)}: build it with the same groups "
            "as when the state was saved"
        )
    for index, (before, now) in enumerate(zip(map(len, saved), present, strict=True)):
        if before != now:
            raise ValueError(
                f"param group {index} has {before} parameters in the state and {now} in the optimizer: parameters were "
                "frozen, or adapters added, since it was saved"
            )


def check_base_entry(base: Optimizer, entry: Mapping[Any, Any], parameter: Tensor, which: str) -> None:
    """Raise ValueError if ``base`` is torch's own and an elementwise tensor has another shape than the parameter."""
    if not f"{type(base).__module__}.".startswith("torch.optim."):
        return
    for name in sorted(_ELEMENTWISE & entry.keys()):
        if entry[name] is not None:  # SGD has no momentum before its first step
            _check_shape(name, entry[name], parameter, which)


def check_own_keys(names: set[Any], which: str | None) -> None:
    """Raise ValueError unless the own keys of one entry are valid and complete. ``which`` labels its parameter."""
    if not names:
        return
    if which is None:
        raise ValueError(f"the saved {min(names)} belongs to no parameter of the param groups: the state is damaged")
    unknown = names - {DIRECTION, COUNTERS}
    if unknown:
        raise ValueError(
            f"the saved {min(unknown)} of {which} is unknown to this version of gradguide: upgrade gradguide"
        )
    if COUNTERS not in names:
        raise ValueError(f"the saved {DIRECTION} of {which} comes without {COUNTERS}: the state is damaged")


def check_direction(value: object, parameter: Tensor, which: str) -> None:
    """Raise ValueError unless ``value`` is a dense, finite floating-point tensor in the shape of ``parameter``."""
    tensor = _dense(DIRECTION, value, which)
    _check_shape(DIRECTION, tensor, parameter, which)
    try:
        finite = bool(local(tensor).float().isfinite().all())  # directions are float32
    except RuntimeError as error:  # a tensor subclass without data
        raise ValueError(f"the saved {DIRECTION} of {which} cannot be read: {error}") from error
    if not finite:
        raise ValueError(f"the saved {DIRECTION} of {which} holds NaN or infinite numbers: the state is damaged")


def read_counters(value: object, which: str) -> Tensor:
    """Return saved counters in the present format, float64 on the host. Older formats are converted.

    Raises:
        ValueError: ``value`` is no counters tensor, or its format is newer.
    """
    tensor = _dense(COUNTERS, value, which)
    if tensor.dim() != 1 or tensor.numel() == 0:
        length = HEAD + len(entries.numbers_of(entries.FORMAT))
        raise ValueError(
            f"the saved {COUNTERS} of {which} must hold {length} numbers, found a tensor of shape {tuple(tensor.shape)}"
        )
    try:
        counters = local(tensor).to("cpu", torch.float64, copy=True)
        version = float(counters[0])
    except RuntimeError as error:  # a tensor subclass without data
        raise ValueError(f"the saved {COUNTERS} of {which} cannot be read: {error}") from error
    if not version.is_integer() or version < 1:
        raise ValueError(f"the saved {COUNTERS} of {which} must have a format of 1 or above, found {version:g}")
    if version > entries.FORMAT:
        raise ValueError(
            f"the state has format {version:g}, this version of gradguide reads up to {entries.FORMAT}: upgrade "
            "gradguide"
        )
    length = HEAD + len(entries.numbers_of(int(version)))
    if len(counters) != length:
        raise ValueError(f"the saved {COUNTERS} of {which} must hold {length} numbers, found {len(counters)}")
    return entries.convert_counters(counters)


def check_counters(counters: Tensor, others: Iterable[Tensor], which: str) -> None:
    """Raise ValueError if counters from :func:`read_counters` cannot result from a step.

    Args:
        others: checked counters of other parameters. Their steps must be equal.
    """
    numbers: list[float] = counters.tolist()
    counts = list(zip(("steps", "skipped"), numbers[1:HEAD], strict=True))
    for name, count in counts:
        if not count.is_integer() or count < 0:
            raise ValueError(f"the saved {COUNTERS} of {which} must count whole {name} from 0, found {count:g}")
    for name, number in zip(entries.numbers_of(entries.FORMAT), numbers[HEAD:], strict=True):
        infinite = math.isinf(number) and name not in _UNBOUNDED
        if math.isnan(number) or infinite or number < 0:
            raise ValueError(
                f"{name} in the saved {COUNTERS} of {which} must be a number of 0 or above, found {number:g}"
            )
    for (name, count), other in zip(counts, next(iter(others), counters)[1:HEAD], strict=True):
        if count != other:
            raise ValueError(
                f"the saved {COUNTERS} of {which} count {count:g} {name}, those of another parameter {other:g}: the "
                "state is damaged, or put together from several"
            )


def _dense(name: str, value: object, which: str) -> Tensor:
    """Return ``value`` detached if it is a dense floating-point tensor.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"the saved {name} of {which} must be a tensor, found {type(value).__name__}")
    unlike = {
        "a nested tensor": value.is_nested,
        f"layout {value.layout}": value.layout is not torch.strided,
        "the meta device, which holds no numbers": value.is_meta,
        f"dtype {value.dtype}": not value.dtype.is_floating_point,
    }
    for found, present in unlike.items():
        if present:
            raise ValueError(f"the saved {name} of {which} must be a dense floating-point tensor, found {found}")
    return value.detach()


def _check_shape(name: str, value: object, parameter: Tensor, which: str) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) and not value.is_nested else None
    if shape != tuple(parameter.shape):
        raise ValueError(
            f"the saved {name} of {which} has shape {type(value).__name__ if shape is None else shape}, the parameter "
            f"{tuple(parameter.shape)}: the state is of another model, of adapters of another rank, or of parameters "
            "in another order"
        )
