"""Guided optimizers with names of their own, for configuration files and registries.

Each line of these files names the class and gives plain values. Rules are mappings, or ``null`` to turn one off.

Hydra, ``instantiate(config.optimizer, model.parameters())``::

    optimizer:
      _target_: gradguide.optim.GuidedAdamW
      lr: 1.0e-3
      magnitude: {max_norm: 0.5}

torchtune::

    optimizer:
      _component_: gradguide.optim.GuidedAdamW
      lr: 2.0e-5
      direction: {damping: 0.3}

Lightning CLI::

    optimizer:
      class_path: gradguide.optim.Guided
      init_args: {base: torch.optim.SGD, base_args: {lr: 0.1, momentum: 0.9}, magnitude: {max_norm: 0.5}}

A source needs names. Give ``model.named_parameters()`` as the parameters; or, where a framework passes
``model.parameters()``, call ``optimizer.set_alignment(Alignment(source), names=model)`` before training.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gradguide.optimizer import GradGuide
from gradguide.regularizer.options import Regularizer
from gradguide.rules.alignment import Alignment
from gradguide.rules.direction import Direction
from gradguide.rules.magnitude import Magnitude
from gradguide.step.buckets import Scope
from gradguide.utils.names import NamesLike

__all__ = ["Guided", "GuidedAdamW"]

_DEFAULTS: Mapping[str, Any] = {}
"""A rule with its defaults, as a plain value: jsonargparse cannot read an instance of a class with slots."""

_Rule = TypeVar("_Rule", Direction, Magnitude, Regularizer)


class Guided(GradGuide):
    """GradGuide around an optimizer that is given by the dotted path of its class.

    Args:
        params: parameters or param groups, as for every optimizer of torch.
        args, kwargs: further arguments of the base, by position or by name.
        base (str): dotted path of the base's class.
        base_args: more of ``kwargs``, for Lightning CLI, which passes no argument that is not in the signature.
        direction, magnitude, regularizer: as for :class:`gradguide.GradGuide`, or a mapping of their options.
        alignment, scope, names, nonfinite, backend: as for :class:`gradguide.GradGuide`.

    Raises:
        TypeError, ValueError: ``base`` names no optimizer class; or see :class:`gradguide.GradGuide`.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = Guided(model.parameters(), 0.1, base="torch.optim.SGD", momentum=0.9, magnitude={"max_norm": 0.5})
    >>> optimizer.defaults["momentum"]
    0.9
    """

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        base: str = "torch.optim.AdamW",
        base_args: Mapping[str, Any] = _DEFAULTS,
        direction: Direction | Mapping[str, Any] | None = None,
        alignment: Alignment | None = None,
        magnitude: Magnitude | Mapping[str, Any] | None = _DEFAULTS,
        scope: Scope = "global",
        regularizer: Regularizer | Mapping[str, Any] | None = None,
        names: NamesLike | None = None,
        nonfinite: str = "skip",
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        kind = _optimizer_class(base)
        if twice := sorted(base_args.keys() & kwargs.keys()):
            raise TypeError(f"base_args holds {', '.join(twice)}, also given by name or default: give each once")
        named = {name: _plain(value) for name, value in (*base_args.items(), *kwargs.items())}
        super().__init__(
            kind(params, *map(_plain, args), **named),
            direction=_rule(Direction, direction),
            alignment=alignment,
            magnitude=_rule(Magnitude, magnitude),
            scope=scope,
            regularizer=_rule(Regularizer, regularizer),
            names=names,
            nonfinite=nonfinite,
            backend=backend,
        )


class GuidedAdamW(Guided):
    """GradGuide around torch's AdamW, whose arguments it takes by position and by name.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, fused: see
            :class:`torch.optim.AdamW`.
        rules: see :class:`Guided`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        **rules: Any,
    ) -> None:
        # By name: jsonargparse takes each positional argument for one of the named arguments of Guided.
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
            base="torch.optim.AdamW",
            **rules,
        )


def _optimizer_class(path: str) -> type[Optimizer]:
    """Return the class with this dotted path."""
    wanted = "base must be the dotted path of an optimizer class, such as torch.optim.SGD"
    if not isinstance(path, str):
        raise TypeError(f"{wanted}, found {path!r}")
    try:
        kind = pkgutil.resolve_name(path)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"{wanted}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"{wanted}, found {path!r}")
    return kind


def _rule(kind: type[_Rule], given: _Rule | Mapping[str, Any] | None) -> _Rule | None:
    return kind(**given) if isinstance(given, Mapping) else given


def _plain(value: Any) -> Any:
    """Return a list, also one of a configuration library, as a tuple, so that a checkpoint holds plain values."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
