"""Handle DTensors (FSDP2, HSDP, tensor parallelism): local tensors, layouts, and sums over shards.

The Gram matrix of sharded vectors is the sum of the local Gram matrices, one per distinct shard. So sharding costs one
all-reduce of a few numbers per scope, for any number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "Layout",
    "all_reduce_over",
    "all_reduce_sum",
    "as_dtensor",
    "check_divided",
    "full",
    "is_distributed",
    "layout_of",
    "local",
    "local_parts",
    "on_any_rank",
    "reduce_partial",
    "shard",
    "to_layout",
]


_PLAIN = (Tensor, nn.Parameter)


class Layout(NamedTuple):
    """The placement of a tensor on ranks: a device mesh, and one placement for each mesh dimension."""

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def reduce_groups(self) -> tuple[Any, ...]:
        """Process groups over which shards differ. Ranks along other mesh dimensions hold the same values."""
        return tuple(
            self.mesh.get_group(dim) for dim, placed in enumerate(self.placements) if not placed.is_replicate()
        )


def layout_of(tensor: Tensor) -> Layout | None:
    """Return the layout of a DTensor, None for a plain tensor."""
    # A failed attribute lookup takes a microsecond, and a step makes many.
    if type(tensor) in _PLAIN:
        return None
    mesh = getattr(tensor, "device_mesh", None)
    return None if mesh is None else Layout(mesh, tuple(tensor.placements))  # type: ignore[attr-defined]


def is_distributed() -> bool:
    """Return whether the default process group has several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_divided(parameters: Iterable[Tensor]) -> None:
    """Raise if FSDP1 shards the parameters.

    FSDP1 shards one flat tensor of all its parameters, and a shard has no layout. Each rank would clip and guide by the
    norm and the Gram matrix of its own shard.

    Raises:
        ValueError: there are several ranks, and FSDP1 holds a parameter.
    """
    if not any(getattr(p, "_fsdp_flattened", False) for p in parameters):
        return
    if is_distributed():
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) holds these parameters in flat pieces, and each rank would measure "
            "only its own. Use FSDP2: fully_shard in torch, fsdp_version: 2 in Accelerate's configuration, or "
            "fsdp_config={'version': 2} in TrainingArguments"
        )


def local_parts(parameter: Tensor, gradient: Tensor, name: str | None = None) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Return this rank's parts of a parameter and its gradient, and the process groups over which they differ.

    Raises:
        ValueError: the gradient is not placed as the parameter, or is a partial sum.
    """
    layout, placed = layout_of(parameter), layout_of(gradient)
    if layout is None and placed is None:
        return parameter, gradient, ()
    problem = None
    if layout is None or placed is None or layout != placed:
        ours, theirs = (None if each is None else each.placements for each in (layout, placed))
        problem = f"has placements {theirs}, its parameter {ours}"
    elif any(placement.is_partial() for placement in placed.placements):
        problem = "is a partial sum on each rank: reduce it first"
    if layout is None or problem is not None:
        which = f"of {name} " if name else ""
        raise ValueError(f"the gradient {which}{problem}; GradGuide needs gradients laid out as their parameters")
    return local(parameter), local(gradient), layout.reduce_groups


def reduce_partial(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return the gradient in the layout of its parameter if each rank has a partial sum, else the gradient itself.

    Sequence parallelism gives such gradients of replicated norms. The cost is one collective, as in the base's step.
    """
    placed = layout_of(gradient)
    if placed is None or not any(placement.is_partial() for placement in placed.placements):
        return gradient
    layout = layout_of(parameter)
    if layout is None or placed.mesh != layout.mesh:
        return gradient
    with torch.no_grad():
        reduced: Tensor = gradient.detach().redistribute(placements=layout.placements)  # type: ignore[attr-defined]
    return reduced


def local(tensor: Tensor) -> Tensor:
    """Return the local part of a DTensor, which shares its memory. Return a plain tensor unchanged."""
    if layout_of(tensor) is None:
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def full(tensor: Tensor) -> Tensor:
    """Gather a DTensor on every rank. Return a plain tensor unchanged."""
    if layout_of(tensor) is None:
        return tensor
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


def shard(whole: Tensor, layout: Layout) -> Tensor:
    """Return this rank's part of a tensor that is whole on every rank, without communication."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(whole.shape, layout.mesh, layout.placements)
    part = whole
    for dim, (length, start) in enumerate(zip(shape, offset, strict=True)):
        part = part.narrow(dim, min(start, part.shape[dim]), length)
    return part.contiguous()


def as_dtensor(part: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor of this rank's part with the layout of ``like``. If ``like`` is plain, return ``part``."""
    layout = layout_of(like)
    if layout is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        _at_start(part), layout.mesh, layout.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _at_start(tensor: Tensor) -> Tensor:
    """Return a tensor at the start of a storage, in the same memory: torch copies and saves only such DTensors."""
    if tensor.storage_offset() == 0 or not tensor.is_contiguous():
        return tensor
    start, size = tensor.storage_offset() * tensor.itemsize, tensor.numel() * tensor.itemsize
    memory = tensor.untyped_storage()[start : start + size]
    return tensor.new_empty(0).set_(memory, 0, tensor.shape, tensor.stride())


def to_layout(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of ``value`` in the layout of ``like``.

    Args:
        value: a DTensor, or a plain tensor that is the same on all ranks.
        like: a tensor with the wanted layout.
    """
    given, wanted = layout_of(value), layout_of(like)
    if given == wanted:
        return local(value)
    return full(value) if wanted is None else shard(full(value), wanted)


def on_any_rank(flag: bool, parameters: Sequence[Tensor]) -> bool:
    """Return whether a flag is true on any rank that has shards of these parameters. All of them must call this."""
    layouts = [layout_of(p) for p in parameters]
    groups = dict.fromkeys(group for layout in layouts if layout is not None for group in layout.reduce_groups)
    if not groups:
        return flag
    number = torch.tensor(int(flag), device=local(parameters[0]).device)
    for group in groups:
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
    return bool(number)


def all_reduce_over(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    """Sum a tensor in place over process groups, one after the other, and return it. None is the default group."""
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_sum(parts: dict[tuple[Any, ...], Tensor]) -> Tensor:
    """All-reduce each tensor over its process groups, and return the sum of all.

    A value that is not finite on one rank makes the sum not finite on all ranks, so that all of them skip the step.

    Args:
        parts: at least one tensor, all of one shape, by the process groups to reduce over. The keys and their order
            must be the same on all ranks: each group is one all-reduce. The tensors are modified.
    """
    whole = parts.get(())
    for groups, part in parts.items():
        if groups and whole is not None:
            part += 0.0 * whole  # 0, or NaN if the replicated tensor is not finite
        all_reduce_over(part, groups)
    return reduce(torch.add, parts.values())
