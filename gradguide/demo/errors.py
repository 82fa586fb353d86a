"""Errors that the user of the demo can act on: the command line prints them in one line, without a traceback."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["EXTRA", "DemoError", "OptionError", "check_extras"]

EXTRA = 'pip install "gradguide[demo]"'

# Import names of what the extra installs and the demo cannot do without; the default model is checked where it is used.
_NEEDED = ("transformers", "peft", "matplotlib", "rich")


class DemoError(Exception):
    """Something outside the code is wrong: an option, a file, a model or the installation."""


class OptionError(DemoError):
    """A value of an option is wrong.

    Args:
        option: the name of the field of ``DemoConfig``, for example ``"source_adapter"``.
        problem: what is wrong with it, with the value, for example ``"must be at least 1, found 0"``.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"--{option.replace('_', '-')} {problem}")
        self.option = option
        self.problem = problem


def check_extras() -> None:
    """Raises DemoError that names every missing package, before any work is done."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {', '.join(missing)}, not installed here: {EXTRA}")
