"""Check option values; each message contains the value."""

from __future__ import annotations

import math

__all__ = ["check_choice", "check_flag", "check_kind", "check_range", "check_steps"]


def check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise unless ``value`` is a number in the interval from ``low`` to ``high``.

    Raises:
        TypeError: ``value`` is not an int or a float.
        ValueError: ``value`` is outside the interval, or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, found {value!r} of type {type(value).__name__}")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if math.isnan(value) or not (above and below):
        interval = f"{'(' if open_low else '['}{_text(low)}, {_text(high)}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be in {interval}, found {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, found {value!r}")


def check_kind(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless ``value`` is an instance of ``kind`` or None."""
    if value is not None and not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__} or None, found {value!r}")


def check_steps(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of steps, found {value!r}")


def _text(bound: float) -> str:
    return str(int(bound)) if math.isfinite(bound) and bound == int(bound) else str(bound)
