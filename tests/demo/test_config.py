from __future__ import annotations

import math

import pytest

from gradguide.demo import config
from gradguide.demo.config import DemoConfig, DemoError, OptionError, check_extras


@pytest.mark.parametrize("option", ["shots", "seeds", "steps", "batch"])
def test_counts_start_at_one(option: str) -> None:
    values: dict[str, int] = {option: 1}
    assert getattr(DemoConfig(**values), option) == 1  # type: ignore[arg-type]
    for value in (0, -1):
        with pytest.raises(OptionError, match=f"^--{option} must be at least 1, found {value}$"):
            DemoConfig(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("lr", [0.0, -1e-3, math.inf, math.nan])
def test_learning_rate_is_positive_and_finite(lr: float) -> None:
    with pytest.raises(OptionError, match=f"^--lr must be above 0 and finite, found {lr}$"):
        DemoConfig(lr=lr)


def test_every_missing_package_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_REQUIRED", ("torch", "gradguide_no_such_package", "gradguide_nor_this"))
    with pytest.raises(
        DemoError, match="not installed: gradguide_no_such_package, gradguide_nor_this; run pip install"
    ):
        check_extras()
