"""The options of the demo."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .data import BUILT_IN
from .errors import OptionError
from .model import DEFAULT_MODEL

__all__ = ["DemoConfig"]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """
    Args:
        data: folder with train.tsv and test.tsv; by default the texts that come with GradGuide.
        model: hub id or folder of an encoder.
        source: source domains; empty for the first five that are not the target.
        target: target domain; None for the last in sorted order.
        shots: training rows per target label, at least 1.
        seeds: number of runs per method, at least 1; run i has seed i, which gives its rows, its head and their order.
        steps: optimizer steps of a run, at least 1.
        batch: rows per step, at least 1.
        lr: learning rate of the adaptation, above 0.
        out: folder for the results, made where it is missing.
        save_source: where to keep the source adapter, its head and the source gradient; None not to.
        source_adapter: a folder that ``save_source`` wrote, to be used in place of training.

    Raises:
        OptionError: a value is out of its range, or two options contradict each other.
    """

    data: Path = BUILT_IN
    model: str = DEFAULT_MODEL
    source: tuple[str, ...] = ()
    target: str | None = None
    shots: int = 4
    seeds: int = 4
    steps: int = 50
    batch: int = 16
    lr: float = 2e-3
    out: Path = Path("gradguide-demo")
    save_source: Path | None = None
    source_adapter: Path | None = None

    def __post_init__(self) -> None:
        for option in ("shots", "seeds", "steps", "batch"):
            value = getattr(self, option)
            if value < 1:
                raise OptionError(option, f"must be at least 1, found {value}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise OptionError("lr", f"must be above 0 and finite, found {self.lr}")
        if self.save_source is not None and self.source_adapter is not None:
            raise OptionError("save_source", "cannot be used with --source-adapter, which trains no source to save")
        if self.save_source is not None and self.save_source.exists() and not _is_empty_folder(self.save_source):
            raise OptionError("save_source", f"must be a new or an empty folder, found {str(self.save_source)!r}")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
