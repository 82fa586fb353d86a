"""Group parameters into buckets: lists of tensors that one pass can process."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from gradguide.distributed.layouts import local_parts, reduce_partial
from gradguide.ops.tensors import TensorList
from gradguide.step.gradients import check_gradient, with_memory
from gradguide.utils.names import module_of

__all__ = ["Bucket", "Label", "Labeler", "Scope", "build_buckets", "scope_labeler", "signs_of"]

Label: TypeAlias = Hashable
Scope: TypeAlias = str | Mapping[Tensor, str] | Mapping[nn.Parameter, str]
Labeler: TypeAlias = Callable[[Tensor, int, int], Label]


@dataclass(slots=True)
class Bucket:
    """Parameters with gradients that share device, precision and sign.

    Either all or no tensors are contiguous. Either all or no parameters have an entry in the sources. Lists are
    aligned, and the parameters of a scope are adjacent.

    reduce_groups: process groups over which products are summed, for DTensors.
    sizes, elements: number of parameters, and of elements in all shards, for each of S scopes.
    values, gradients: this rank's shards of parameters and gradients.
    names: empty if the sources have no entry.
    groups, positions: index of each parameter's group, and of the parameter over all groups.
    sign: -1 if the param groups maximize, else 1. The step descends along ``sign`` times the gradient.
    """

    reduce_groups: tuple[Any, ...] = ()
    sizes: list[int] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    values: TensorList = field(default_factory=TensorList)
    gradients: TensorList = field(default_factory=TensorList)
    names: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sign: int = 1


def signs_of(base: Optimizer) -> list[int]:
    """Return the sign of each param group: -1 if it maximizes, else 1."""
    default = getattr(base, "maximize", False)
    return [-1 if group.get("maximize", default) else 1 for group in base.param_groups]


def scope_labeler(scope: Scope, names: Mapping[Tensor, str]) -> Labeler:
    """Return a function from a parameter, its group index and its index in the group to its scope label.

    A parameter with its own scope is labelled by its indices, which copies and checkpoints preserve.

    Raises:
        ValueError: the scope is unknown, or needs names and none are given.
        TypeError: the scope is neither a string nor a mapping.
    """
    if isinstance(scope, Mapping):
        labels: dict[Tensor, str] = dict(scope.items())
        # A parameter outside the mapping, such as a new head, has its own scope.
        return lambda parameter, group, place: labels.get(parameter, (group, place))
    if not isinstance(scope, str):
        raise TypeError(f"scope must be a string or map parameters to scopes, found {type(scope).__name__}")
    match scope:
        case "global":
            return lambda parameter, group, place: None
        case "group":
            return lambda parameter, group, place: group
        case "tensor":
            return lambda parameter, group, place: (group, place)
        case "module":
            if not names:
                raise ValueError("scope='module' needs names=model.named_parameters(), found none")
            return lambda p, group, place: module_of(names[p]) if p in names else (group, place)
    raise ValueError(f"scope must be 'global', 'group', 'module', 'tensor' or a mapping of parameters, found {scope!r}")


def build_buckets(
    groups: list[dict[str, Any]],
    label: Labeler,
    names: Mapping[Tensor, str],
    covered: Container[str],
    labels: dict[Label, int],
    signs: Sequence[int],
) -> list[Bucket]:
    """Return the buckets of this step in a fixed order. Parameters whose gradient is None are left out.

    Args:
        groups: the base's param groups. Pass them at each step: loaders and wrappers replace them.
        label: from :func:`scope_labeler`.
        names: parameter names.
        covered: names that the sources contain.
        labels: index of each scope. New scopes are added in place.
        signs: sign of each group, from :func:`signs_of`.

    Raises:
        ValueError: a gradient is sparse, complex, or shared by two parameters, or a parameter is a negated view.
        RuntimeError: a gradient is a fake tensor.
    """
    found: dict[tuple[Hashable, ...], list[_Entry]] = {}
    counter = count()
    for index, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            gradient, position = parameter.grad, next(counter)
            if gradient is None:
                continue
            name = names.get(parameter)
            check_gradient(parameter, gradient, name)
            if (reduced := reduce_partial(gradient, parameter)) is not gradient:
                parameter.grad = gradient = reduced
            value, part, reduce_groups = local_parts(parameter, gradient, name)
            plain = _is_plain(value) and _is_plain(part)
            if not plain:
                part = with_memory(parameter, gradient, part)
            scope = label(parameter, index, place)
            name = name if name in covered else None
            # One tensor that no kernel reads would take its whole bucket to the portable backend.
            key = (reduce_groups, signs[index], part.device, part.dtype, value.dtype, name is not None, plain)
            number = labels.setdefault(scope, len(labels))
            entry = _Entry(number, parameter, value, part, name, index, position)
            found.setdefault(key, []).append(entry)
    _check_apart((entry for each in found.values() for entry in each), names)
    return [_bucket(key[0], signs[entries[0].group], entries, len(labels)) for key, entries in found.items()]


class _Entry(NamedTuple):
    """A parameter with a gradient, and this rank's part of both: scope, name if the sources have it, group, number."""

    scope: int
    parameter: Tensor
    value: Tensor
    gradient: Tensor
    name: str | None
    group: int
    position: int


def _bucket(reduce_groups: Any, sign: int, entries: list[_Entry], scopes: int) -> Bucket:
    bucket = Bucket(reduce_groups, [0] * scopes, [0] * scopes, sign=sign)
    for scope, parameter, value, gradient, name, group, position in sorted(entries, key=itemgetter(0)):
        bucket.sizes[scope] += 1
        bucket.elements[scope] += parameter.numel()
        bucket.parameters.append(parameter)
        bucket.values.append(value)
        bucket.gradients.append(gradient)
        bucket.groups.append(group)
        bucket.positions.append(position)
        if name is not None:
            bucket.names.append(name)
    return bucket


def _check_apart(entries: Iterable[_Entry], names: Mapping[Tensor, str]) -> None:
    """Raise ValueError where two parameters share the memory of a gradient: each needs a guided gradient of its own."""
    seen: dict[int, _Entry] = {}
    for entry in entries:
        address = entry.gradient.data_ptr() if entry.gradient.numel() and type(entry.gradient) is Tensor else 0
        if address and address in seen:
            pair = (seen[address].parameter, entry.parameter)
            first, second = (names.get(p) or f"a parameter of shape {tuple(p.shape)}" for p in pair)
            raise ValueError(
                f"{first} and {second} share one gradient tensor, which can hold the guided gradient of one of them "
                "only: give each its own, p.grad = p.grad.clone()"
            )
        seen[address] = entry


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous() and not tensor.is_neg()
