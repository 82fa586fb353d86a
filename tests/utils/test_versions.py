"""Versions of installed packages, and None for others."""

from __future__ import annotations

import torch

from gradguide.utils.versions import installed_version


def test_the_version_of_an_installed_package() -> None:
    assert installed_version("torch") == torch.__version__


def test_a_package_that_is_not_installed_has_none() -> None:
    assert installed_version("no-such-package-as-this") is None
