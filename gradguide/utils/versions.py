"""Versions of installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_version"]


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed, or imported from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
