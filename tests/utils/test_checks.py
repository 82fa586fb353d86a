"""Checks of option values: what passes, and messages that contain the value."""

from __future__ import annotations

import math

import pytest

from gradguide.utils.checks import check_choice, check_flag, check_kind, check_range, check_steps


@pytest.mark.parametrize("value", [0, 0.5, 1, 1.0])
def test_a_closed_interval_has_its_ends(value: float) -> None:
    check_range("decay", value, 0, 1)


@pytest.mark.parametrize(
    ("value", "ends", "interval"),
    [
        (-0.1, {}, "[0, 1]"),
        (1.5, {}, "[0, 1]"),
        (0, {"open_low": True}, "(0, 1]"),
        (1.0, {"open_high": True}, "[0, 1)"),
        (math.nan, {}, "[0, 1]"),
        (math.inf, {}, "[0, 1]"),
    ],
)
def test_other_numbers_are_refused_with_interval_and_value(value: float, ends: dict[str, bool], interval: str) -> None:
    with pytest.raises(ValueError) as error:
        check_range("decay", value, 0, 1, **ends)
    assert str(error.value) == f"decay must be in {interval}, found {value}"


@pytest.mark.parametrize("value", [True, "1", None, [1]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="decay must be a number, found"):
        check_range("decay", value, 0, 1)  # type: ignore[arg-type]


def test_bounds_are_shown_as_given() -> None:
    with pytest.raises(ValueError, match=r"lr must be in \[0\.05, inf\), found 0\.01"):
        check_range("lr", 0.01, 0.05, math.inf, open_high=True)


def test_choices_flags_kinds_and_steps() -> None:
    check_choice("on", "update", ("update", "gradient"))
    check_flag("project", False)
    check_kind("direction", None, int)
    check_kind("direction", 3, int)
    check_steps("warmup", 0)
    with pytest.raises(ValueError, match="on must be one of 'update', 'gradient', found 'both'"):
        check_choice("on", "both", ("update", "gradient"))
    with pytest.raises(TypeError, match="project must be True or False, found 1"):
        check_flag("project", 1)
    with pytest.raises(TypeError, match="direction must be a float or None, found 3"):
        check_kind("direction", 3, float)
    for value in (True, 1.0, "1"):
        with pytest.raises(TypeError, match="warmup must be a whole number of steps, found"):
            check_steps("warmup", value)
