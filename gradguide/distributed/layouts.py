"""DTensors (FSDP2, HSDP, tensor parallelism): the local tensors that passes read, and the sums over their shards.

A Gram matrix of vectors that are spread over ranks is the sum of the local Gram matrices, one per distinct shard. So
one all-reduce of a few numbers per scope is all that sharding costs, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "Layout",
    "all_reduce_sum",
    "as_dtensor",
    "check_divided",
    "is_distributed",
    "layout_of",
    "local",
    "shard",
    "to_layout",
    "unsupported",
]


_PLAIN = (Tensor, nn.Parameter)


class Layout(NamedTuple):
    """How a tensor lies over ranks: a device mesh, and one placement for each of its dimensions."""

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def reduce_groups(self) -> tuple[Any, ...]:
        """The process groups over which shards differ; ranks along the other dimensions hold the same."""
        return tuple(
            self.mesh.get_group(dim) for dim, placed in enumerate(self.placements) if not placed.is_replicate()
        )


def layout_of(tensor: Tensor) -> Layout | None:
    """The layout of a DTensor, None for a plain tensor."""
    if type(tensor) in _PLAIN:  # an attribute that is not there takes a microsecond to look for, and a step asks often
        return None
    mesh = getattr(tensor, "device_mesh", None)
    return None if mesh is None else Layout(mesh, tuple(tensor.placements))  # type: ignore[attr-defined]


def is_distributed() -> bool:
    """Whether this process is one of several in a default process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_divided(parameters: Iterable[Tensor]) -> None:
    """Raise unless what divides the parameters among ranks leaves on each of them its layout.

    FSDP1 cuts one flat tensor of all its parameters into pieces, and a piece does not tell whose it is or who has the
    others: each rank would measure its own, and clip and guide by it.

    Raises:
        ValueError: several ranks, and a parameter that FSDP1 holds.
    """
    if not any(getattr(p, "_fsdp_flattened", False) for p in parameters):
        return
    if is_distributed():
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) holds these parameters in flat pieces, of which each rank would measure "
            "only its own. Use FSDP2: torch's fully_shard, or fsdp_version 2 in Accelerate and Trainer"
        )


def unsupported(parameter: Tensor, gradient: Tensor) -> str | None:
    """Why a DTensor's gradient cannot be measured, or None if it can."""
    theirs, ours = layout_of(gradient), layout_of(parameter)
    if theirs is None and ours is None:
        return None
    if ours is None or theirs is None or theirs.mesh != ours.mesh or theirs.placements != ours.placements:
        found = None if theirs is None else theirs.placements
        return f"lies over ranks as {found}, its parameter as {None if ours is None else ours.placements}"
    if any(placed.is_partial() for placed in theirs.placements):
        return "is a partial sum on each rank: reduce it first"
    return None


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, the same memory; a plain tensor as it is."""
    if layout_of(tensor) is None:
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def shard(whole: Tensor, layout: Layout) -> Tensor:
    """This rank's part of a tensor that every rank has whole; no communication."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(whole.shape, layout.mesh, layout.placements)
    part = whole
    for dim, (length, start) in enumerate(zip(shape, offset, strict=True)):
        part = part.narrow(dim, min(start, part.shape[dim]), length)
    return part.contiguous()


def as_dtensor(part: Tensor, like: Tensor) -> Tensor:
    """A DTensor of this rank's part, laid out as ``like``; ``part`` itself where ``like`` is plain."""
    layout = layout_of(like)
    if layout is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, layout.mesh, layout.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def to_layout(value: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of ``value``, a DTensor or the same whole tensor on all ranks, where it lies as ``like``."""
    given, wanted = layout_of(value), layout_of(like)
    if given == wanted:
        return local(value)
    whole: Tensor = value if given is None else value.full_tensor()  # type: ignore[attr-defined]
    return whole if wanted is None else shard(whole, wanted)


def all_reduce_sum(parts: dict[tuple[Any, ...], Tensor]) -> Tensor | None:
    """Return the sum over ranks: each tensor over its process groups, then all together; None where there is none.

    A number that is not finite on one rank makes the sum not finite on all of them, so that all leave out the step.

    Args:
        parts: tensors of one shape by the process groups that they are to be summed over. The keys, and their order,
            must be the same on all ranks: each group is one all-reduce.
    """
    total: Tensor | None = None
    whole = parts.get(())
    for groups, part in parts.items():
        if groups and whole is not None:
            part += 0.0 * whole  # zero, or NaN where a tensor that is whole here is not finite
        for group in groups:
            dist.all_reduce(part, group=group)
        total = part if total is None else total + part
    return total
