"""Measure the host's part of a GPU step, without a GPU: ``python -m benchmarks.host`` writes results/host.csv.

On a LoRA set kernels take a few tenths of a millisecond, so Python can dominate a step. Here every launch is replaced
by a function that does nothing, for the kernels of GradGuide and for torch's operations on lists of tensors. The time
that is left is Python before and between launches; the launches themselves are not included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.harness import BASELINE, Case, Result, compared, save, time_side_by_side, versions
from benchmarks.registers import recorded
from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.step import nonfinite as finite

RESULTS = Path(__file__).parent / "results" / "host.csv"

SETS = {"LoRA r16 of a 1.1B Llama": 308, "LoRA r16 of a 70B Llama": 1120}
"""Number of tensors, on which the host's part depends."""

_SHAPE = (4, 2)

Named = list[tuple[str, nn.Parameter]]
Make = Callable[[Named], Optimizer]


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Replace launches by functions that do nothing, and select the Triton kernels, within the context."""

    def norms(tensors: Sequence[Tensor], *_: object) -> list[Tensor]:
        return [one] * len(tensors)

    one = torch.ones(())
    with ExitStack() as replaced:
        for name in ("_foreach_mul_", "_foreach_add_", "_fused_adamw_"):
            replaced.enter_context(mock.patch.object(torch, name, lambda *_, **__: None))
        replaced.enter_context(mock.patch.object(torch, "_foreach_norm", norms))
        replaced.enter_context(mock.patch("gradguide.ops.lacks_triton", lambda device: None))
        # As on CUDA, where a fused base itself skips a step that is not finite.
        replaced.enter_context(mock.patch.object(finite, "uses_found_inf", lambda *_: True))
        replaced.enter_context(recorded())
        yield


def base(named: Named) -> AdamW:
    """Return the base optimizer."""
    return AdamW([p for _, p in named], fused=True)


def guided(named: Named, *, on: str | None = None, anchored: bool = False, **options: object) -> GradGuide:
    """Return GradGuide with a source on ``on``, with an anchored source, or without a source."""
    ones = {name: torch.ones(_SHAPE) for name, _ in named}
    if on is not None:
        options["alignment"] = Alignment(SourceGradient(ones), on=on, weight=1.0)
    elif anchored:
        options["alignment"] = Alignment(SourceGradient(None, fisher=ones, anchor=dict(ones)).anchored())
    return GradGuide(base(named), names=named, backend="triton", **options)  # type: ignore[arg-type]


_CLIPPING = Magnitude(max_update=None)
PROVIDERS: dict[str, Make] = {
    BASELINE: base,
    "direction + source + clipping": lambda named: guided(
        named, on="gradient", magnitude=_CLIPPING, direction=Direction()
    ),
    "direction (shared momentum) + source + clipping": lambda named: guided(
        named, on="gradient", magnitude=_CLIPPING, direction=Direction(share_momentum=True)
    ),
    "defaults, no source": guided,
    "defaults, anchored source": lambda named: guided(named, anchored=True),
    "defaults, anchored source, scope by tensor": lambda named: guided(named, anchored=True, scope="tensor"),
}


def case(name: str, make: Make, tensors: int) -> Case:
    """Return a step to time. Gradients are new tensors at each step, as after ``zero_grad``."""
    named = [(f"layer{i}", nn.Parameter(torch.ones(_SHAPE))) for i in range(tensors)]
    parameters = [p for _, p in named]
    optimizer = make(named)

    def prepare() -> None:
        for parameter in parameters:
            parameter.grad = torch.ones(_SHAPE)

    def run() -> None:
        if name == BASELINE:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return Case(name=name, prepare=prepare, run=run)


def measure(benchmark: str, tensors: int, rounds: int) -> list[Result]:
    """Return the milliseconds of every provider, and their ratio to the baseline."""
    with nothing_launched():
        cases = [case(name, make, tensors) for name, make in PROVIDERS.items()]
        times = time_side_by_side(cases, rounds=rounds, warmup=5, label=benchmark)
    return compared(benchmark, times, BASELINE, "host's part")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    results = [row for name, tensors in SETS.items() for row in measure(name, tensors, options.rounds)]
    save(options.out, results, versions())
    for row in results:
        print(f"{row.benchmark:26} {row.provider:48} {row.value:8.3f} {row.unit} ({row.low:.3f} .. {row.high:.3f})")


if __name__ == "__main__":
    main()
