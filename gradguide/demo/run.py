"""The demo from end to end, and in parts for scripts that compare methods of their own.

    prepared = prepare(DemoConfig(seeds=3))
    outcomes = compare(prepared, {"AdamW": default_methods(2e-3)["AdamW"], "mine": make_mine})

where ``make_mine(model, source)`` returns a ``torch.optim.Optimizer`` over ``trainable(model)``.
"""

from __future__ import annotations

from collections.abc import Mapping

from tqdm import tqdm

from .adapt import Outcome, adapt
from .config import DemoConfig
from .errors import OptionError
from .methods import Method, default_methods, trainable
from .prepare import Prepared, prepare
from .report import table, write_report

__all__ = ["DemoConfig", "Outcome", "Prepared", "compare", "default_methods", "prepare", "run", "trainable"]


def compare(prepared: Prepared, methods: Mapping[str, Method]) -> list[Outcome]:
    """Runs every method on every seed, from the same start; outcomes come seed by seed, methods in the given order."""
    config = prepared.config
    total = len(methods) * config.seeds * config.steps
    with tqdm(total=total, desc="adapt", unit="step", disable=None) as bar:
        return [
            adapt(prepared, name, method, seed, bar) for seed in range(config.seeds) for name, method in methods.items()
        ]


def run(config: DemoConfig) -> list[Outcome]:
    """The whole demo: prepares, compares AdamW and GradGuide, prints the table and writes the results.

    Raises:
        DemoError: see ``prepare``; or the results cannot be written.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("out", f"must be a folder that can be written, found {str(config.out)!r}: {error}") from error
    prepared = prepare(config)
    outcomes = compare(prepared, default_methods(config.lr))
    paths = write_report(config.out, prepared, outcomes)
    _show(prepared, outcomes)
    for path in paths:
        print(f"wrote {path}")
    return outcomes


def _show(prepared: Prepared, outcomes: list[Outcome]) -> None:
    from rich.console import Console

    Console().print(table(prepared, outcomes))
