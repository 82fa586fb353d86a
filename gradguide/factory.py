"""Make GradGuide from an optimizer class, and find a GradGuide inside other wrappers."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, cast
from weakref import WeakValueDictionary

from torch.optim import Optimizer

from gradguide.optimizer import GradGuide

__all__ = ["guided", "recipe_of", "unwrap"]


_P = ParamSpec("_P")


def guided(base: Callable[_P, Optimizer], **guide_options: Any) -> Callable[_P, GradGuide]:
    """Return a subclass of GradGuide with the constructor arguments of ``base``: ``(params, lr, ...)``.

    Use it for arguments that take an optimizer class, such as Trainer's
    ``optimizer_cls_and_kwargs=(guided(AdamW, direction=Direction()), {"lr": 1e-3})``. The class can be subclassed and
    pickled. Equal arguments return the same class.

    Args:
        base: an optimizer class, or a function that returns an optimizer.
        guide_options: keyword arguments of :class:`gradguide.GradGuide`.

    Raises:
        TypeError: ``base`` is not callable. Pass an existing optimizer to :class:`gradguide.GradGuide` instead.
    """
    if not callable(base):
        raise TypeError(
            f"guided() takes an optimizer class, found {type(base).__name__}; wrap an instance with GradGuide(...)"
        )
    key = (base, frozenset(guide_options.items())) if _hashable(base, *guide_options.values()) else None
    made = _classes.get(key)
    if made is None:
        made = _guided_class(base, guide_options)
        if key is not None:
            _classes[key] = made
    return cast("Callable[_P, GradGuide]", made)


class _GuidedType(type):
    """Metaclass of guided classes. Its pickle reducer rebuilds a class from its recipe."""

    _recipe: tuple[Callable[..., Optimizer], dict[str, Any]]


# One class per recipe. Weak values, so that unused classes are freed.
_classes: WeakValueDictionary[Hashable, type[GradGuide]] = WeakValueDictionary()


def _guided_class(base: Callable[..., Optimizer], options: dict[str, Any]) -> type[GradGuide]:
    def __init__(self: GradGuide, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        GradGuide.__init__(self, base(*args, **kwargs), **options)

    try:
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        like = inspect.signature(base)
        __init__.__signature__ = like.replace(parameters=[own, *like.parameters.values()])  # type: ignore[attr-defined]
    except (TypeError, ValueError):  # compiled functions may have no signature
        pass
    name = f"Guided{getattr(base, '__name__', type(base).__name__)}"
    members = {"__init__": __init__, "__doc__": f"GradGuide around {base!r}.", "_recipe": (base, options)}
    return cast("type[GradGuide]", _GuidedType(name, (GradGuide,), members))


def recipe_of(made: object) -> tuple[Callable[..., Optimizer], dict[str, Any]] | None:
    """Return the base and the options that :func:`guided` made a class from; None for other classes and subclasses."""
    return vars(made).get("_recipe") if isinstance(made, _GuidedType) else None


def _reduce(made: _GuidedType) -> str | tuple[Any, ...]:
    # A subclass of a guided class is pickled by its qualified name.
    recipe = recipe_of(made)
    return made.__qualname__ if recipe is None else (_rebuild, recipe)


def _rebuild(base: Callable[..., Optimizer], options: dict[str, Any]) -> Callable[..., GradGuide]:
    return guided(base, **options)


copyreg.pickle(_GuidedType, _reduce)


def _hashable(*values: object) -> bool:
    try:
        hash(values)
    except TypeError:
        return False
    return True


def unwrap(optimizer: object) -> GradGuide | None:
    """Return the GradGuide inside wrappers such as those of Accelerate and Lightning, or None."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        own = getattr(optimizer, "__dict__", {})  # without attributes that a wrapper forwards by ``__getattr__``
        # Lightning's wrapper is an instance of the wrapped class, so isinstance alone is not enough.
        if isinstance(optimizer, GradGuide) and "base" in own:
            return optimizer
        seen.add(id(optimizer))
        # Wrappers store the wrapped optimizer under one of these names.
        optimizer = next((own[name] for name in ("optimizer", "_optimizer") if own.get(name) is not None), None)
    return None
