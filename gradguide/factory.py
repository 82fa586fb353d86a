"""GradGuide where an optimizer class is wanted, and GradGuide found again inside other wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from gradguide.optimizer import GradGuide

__all__ = ["guided", "unwrap"]


def guided(base: Callable[..., Optimizer], **guide_options: Any) -> Callable[..., GradGuide]:
    """A class ``(params, **base_options)`` for places that want an optimizer class, as HF Trainer's
    ``optimizer_cls_and_kwargs=(guided(AdamW, direction=Direction()), {"lr": 1e-3})``.

    It is a subclass of GradGuide, because such places check for an optimizer class; what it makes is a plain GradGuide,
    which can be copied and pickled.

    Args:
        base: an optimizer class, or what makes one.
        guide_options: keyword arguments of :class:`gradguide.GradGuide`.

    Raises:
        TypeError: ``base`` cannot be called (an optimizer that exists already goes into GradGuide itself).
    """
    if not callable(base):
        raise TypeError(
            f"guided() takes an optimizer class, found {type(base).__name__}; wrap an instance with GradGuide(...)"
        )
    name = f"Guided{getattr(base, '__name__', type(base).__name__)}"

    def make(cls: type, params: Any, **base_options: Any) -> GradGuide:
        return GradGuide(base(params, **base_options), **guide_options)

    # What is made is no instance of the new class, so Python does not call __init__ on it a second time.
    return type(name, (GradGuide,), {"__new__": make, "__doc__": f"GradGuide around {base!r}."})


def unwrap(optimizer: object) -> GradGuide | None:
    """The GradGuide inside the wrappers of Accelerate, Lightning and the like, or None if there is none."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        # Lightning's wrapper is made an instance of the class it wraps, so the class alone says nothing.
        if isinstance(optimizer, GradGuide) and "base" in vars_of(optimizer):
            return optimizer
        seen.add(id(optimizer))
        # Wrappers keep what they wrap under one of these names.
        optimizer = next(
            (inner for name in ("optimizer", "_optimizer") if (inner := vars_of(optimizer).get(name)) is not None), None
        )
    return None


def vars_of(thing: object) -> dict[str, Any]:
    """Attributes set on the object itself; a wrapper's forwarding ``__getattr__`` is not asked."""
    return getattr(thing, "__dict__", {})
