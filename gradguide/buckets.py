"""From param groups to buckets: lists of tensors that a pass can take together."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradguide.memory import check_numbers, with_memory
from gradguide.naming import module_of
from gradguide.ops.tensors import Tensors, are_plain
from gradguide.sharding import layout_of, local, unsupported

__all__ = ["Bucket", "Label", "Labeller", "Scope", "gather", "labeller", "signs_of"]

Label: TypeAlias = Hashable
Scope: TypeAlias = str | Mapping[Tensor, str] | Mapping[nn.Parameter, str]
Labeller: TypeAlias = Callable[[Tensor, int, int], Label]


@dataclass(slots=True)
class Bucket:
    """Parameters with gradients, of one device, precision and sign, all or none plain and known to the sources.

    Lists are aligned, and the parameters of a scope follow one another: ``sizes`` says of each of S scopes how many
    they are, and ``elements`` how many numbers those have, whole. ``names`` is empty where the sources know nothing. Of
    a DTensor, ``values`` and ``gradients`` are this rank's part, and ``summed`` are the process groups that products
    are to be summed over. ``groups`` are the numbers of the param groups, ``places`` those of the parameters, counted
    through all groups. ``sign`` is -1 where the param groups maximize, else 1: ``sign`` times the gradient is the
    gradient of what the step descends. ``plain`` says whether passes may go by the tensors' addresses (see
    ``gradguide.ops.tensors.are_plain``).
    """

    summed: tuple[Any, ...] = ()
    sizes: list[int] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    values: Tensors = field(default_factory=Tensors)
    gradients: Tensors = field(default_factory=Tensors)
    names: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    sign: int = 1
    plain: bool = True


def signs_of(base: Optimizer) -> list[int]:
    """Return the sign of each param group: -1 where it maximizes, else 1."""
    default = getattr(base, "maximize", False)
    return [-1 if group.get("maximize", default) else 1 for group in base.param_groups]


def labeller(scope: Scope, names: Mapping[Tensor, str]) -> Labeller:
    """What tells a parameter's scope from itself, its group's index and its place there.

    A parameter that makes a scope of its own is labelled by its place, which outlives copies and checkpoints.

    Raises:
        ValueError: the scope is unknown, or needs names that are not there.
        TypeError: the scope is neither a string nor a mapping.
    """
    if isinstance(scope, Mapping):
        labels: dict[Tensor, str] = dict(scope.items())
        # A parameter outside the mapping (a new head beside the adapters) is a scope of its own.
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


def gather(
    groups: list[dict[str, Any]],
    label: Labeller,
    names: Mapping[Tensor, str],
    covered: Container[str],
    labels: dict[Label, int],
    signs: Sequence[int],
    *,
    sharded: bool = False,
) -> list[Bucket]:
    """The buckets of this step, in a fixed order. Parameters whose gradient is None are left out.

    Args:
        groups: the base optimizer's param groups, read anew at each step, since loaders and wrappers replace them.
        label: tells a parameter's scope.
        names: the names of parameters.
        covered: the names that the sources know.
        labels: numbers of the scopes that are known before; those that are met first here are added.
        signs: of each group, from :func:`signs_of`.
        sharded: whether any parameter is a DTensor.

    Raises:
        ValueError: a gradient is sparse, complex, or shared by two parameters, or a parameter is a negated view.
        RuntimeError: a gradient is a fake tensor.
    """
    found: dict[tuple[Hashable, ...], list[_Called]] = {}
    number = count()
    for index, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            gradient, position = parameter.grad, next(number)
            if gradient is None:
                continue
            uneven = unsupported(parameter, gradient) if sharded else None
            if uneven is not None or gradient.layout != torch.strided or not gradient.is_floating_point():
                _refuse(gradient, names.get(parameter), uneven)
            check_numbers(parameter, gradient, names.get(parameter))
            layout = layout_of(parameter) if sharded else None
            summed = () if layout is None else layout.summed
            scope = label(parameter, index, place)
            name = names.get(parameter)
            name = name if name is not None and name in covered else None
            value = local(parameter) if sharded else parameter
            part = local(gradient) if sharded else gradient
            # What no kernel reads in place is not to take the rest with it to the portable backend.
            plain = are_plain((value, part))
            if not plain and part is gradient:
                part = with_memory(parameter, gradient)
            key = (summed, signs[index], part.device, part.dtype, value.dtype, name is not None, plain)
            called = _Called(labels.setdefault(scope, len(labels)), parameter, value, part, name, index, position)
            found.setdefault(key, []).append(called)
    _check_apart((called for each in found.values() for called in each), names)
    return [
        _bucket(key[0], signs[called[0].group], called, len(labels), plain=bool(key[-1]))
        for key, called in found.items()
    ]


class _Called(NamedTuple):
    """A parameter with a gradient, and this rank's part of both: its scope, name and place."""

    scope: int
    parameter: Tensor
    value: Tensor
    gradient: Tensor
    name: str | None
    group: int
    place: int


def _bucket(summed: Any, sign: int, called: list[_Called], scopes: int, *, plain: bool) -> Bucket:
    bucket = Bucket(summed, [0] * scopes, [0] * scopes, sign=sign, plain=plain)
    for scope, parameter, value, gradient, name, group, place in sorted(called, key=itemgetter(0)):
        bucket.sizes[scope] += 1
        bucket.elements[scope] += parameter.numel()
        bucket.parameters.append(parameter)
        bucket.values.append(value)
        bucket.gradients.append(gradient)
        bucket.groups.append(group)
        bucket.places.append(place)
        if name is not None:
            bucket.names.append(name)
    return bucket


def _check_apart(called: Iterable[_Called], names: Mapping[Tensor, str]) -> None:
    """Raise ValueError where two parameters share the memory of a gradient: each needs a guided gradient of its own."""
    seen: dict[int, _Called] = {}
    for one in called:
        address = one.gradient.data_ptr() if one.gradient.numel() and type(one.gradient) is Tensor else 0
        if address and address in seen:
            pair = (seen[address].parameter, one.parameter)
            first, second = (names.get(p) or f"a parameter of shape {tuple(p.shape)}" for p in pair)
            raise ValueError(
                f"{first} and {second} share one gradient tensor, which can hold the guided gradient of one of them "
                "only: give each its own, p.grad = p.grad.clone()"
            )
        seen[address] = one


def _refuse(gradient: Tensor, name: str | None, uneven: str | None) -> None:
    which = f"of {name} " if name else ""
    if uneven is not None:
        raise ValueError(f"the gradient {which}{uneven}; GradGuide measures DTensors that lie as their parameters do")
    if gradient.is_complex():
        raise ValueError(f"the gradient {which}is complex ({gradient.dtype}); GradGuide guides real parameters")
    raise ValueError(
        f"the gradient {which}is sparse ({gradient.layout}), which has no running direction; use "
        "nn.Embedding(..., sparse=False), or keep this parameter in an optimizer of its own"
    )
