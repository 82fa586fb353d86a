"""Raise on every rank if one rank fails, so that no rank waits in a collective that the failed one does not reach."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradguide.distributed.layouts import is_distributed, layout_of

__all__ = ["fail_together"]

logger = logging.getLogger(__name__)


@contextmanager
def fail_together(parameters: Iterable[Tensor], group: Any) -> Iterator[None]:
    """Raise on every rank if the body, a capture, raises an exception on any rank. It costs one all-reduce of a number.

    A rank whose body raised logs its exception, waits for the other ranks to end their bodies, and raises it.
    KeyboardInterrupt and SystemExit are raised at once.

    If parameters are sharded, passes of the model contain collectives, so that ranks fail in these. Nothing is reduced
    then: the failed rank's reduction would pair with another collective of the others.

    Args:
        parameters: those of the model that the body runs. The first one has the device of the reduction.
        group: process group of the ranks that run it; None is the default group.

    Raises:
        RuntimeError: the body raised an exception on another rank only.
    """
    tensors = list(parameters)
    if not tensors or not is_distributed() or any(map(_is_sharded, tensors)):
        yield
        return
    device = tensors[0].device
    try:
        yield
    except Exception as error:
        logger.error("capture failed on rank %d, which waits for the other ranks: %r", dist.get_rank(), error)
        with suppress(RuntimeError):  # a device error may also break the reduction; the first error is the cause
            _failures(True, device, group)
        raise
    failures = _failures(False, device, group)
    if failures:
        raise RuntimeError(
            f"capture failed on {failures} of {dist.get_world_size(group)} ranks, not on rank {dist.get_rank()}: see "
            "the error of the other rank. Nothing was captured"
        )


def _failures(failed: bool, device: torch.device, group: Any) -> int:
    """Return the number of ranks that failed."""
    count = torch.tensor(int(failed), device=device)
    dist.all_reduce(count, group=group)
    return int(count)


def _is_sharded(parameter: Tensor) -> bool:
    """Return whether FSDP2, tensor parallelism, FSDP1 or DeepSpeed shards the parameter."""
    return (
        layout_of(parameter) is not None or getattr(parameter, "_fsdp_flattened", False) or hasattr(parameter, "ds_id")
    )
