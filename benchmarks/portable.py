"""What the portable backend costs on a CPU: ``python -m benchmarks.portable --out FILE``.

Whole steps and single passes over LoRA r16 of a 1.1B Llama, beside clipping and AdamW, and beside the plain torch code
that one would write for these passes.

``results/portable.csv`` is from the commit that it names, the last one with passes compiled from C. Its version of this
file timed both in turns. The compiled passes were removed on the ground of these figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import BASELINE, Case, Result, compared, save, time_side_by_side, versions
from benchmarks.sets import SETS
from benchmarks.step import Option, Problem, Provider, base
from gradguide import Alignment, GradGuide
from gradguide.ops import Row, Stack, Write, foreach
from gradguide.ops.allocate import allocate_contiguous

SET = SETS["LoRA r16 of a 1.1B Llama"]
PORTABLE, PLAIN = "portable backend", "plain torch code"


def steps(rounds: int) -> list[Result]:
    """Default steps, without a source and with an anchored one."""
    problem = Problem(SET.shapes, torch.device("cpu"), batches=3)

    def guided(named: list[tuple[str, Tensor]], *, source: bool) -> GradGuide:
        alignment = Alignment(problem.source(named, moving=True).anchored()) if source else None
        return GradGuide(base(named), alignment=alignment, names=named)

    results = []
    for label, source in (("defaults, no source", False), ("defaults, anchored source", True)):
        made = [
            Provider(BASELINE, problem, Option(base, 0), clip=True),
            Provider(PORTABLE, problem, Option(partial(guided, source=source), 0), clip=False),
        ]
        results += timed(f"step, {label}", [provider.case for provider in made], BASELINE, rounds)
    return results


def passes(rounds: int) -> list[Result]:
    """Measuring and combining gradient and direction."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in SET.shapes]
    fresh = [torch.randn(shape, generator=generator) for shape in SET.shapes]
    gradient, direction = [torch.empty_like(p) for p in parameters], allocate_contiguous(parameters)
    rows = [Row(offset=gradient), Row(offset=direction)]
    turned, guided = (torch.tensor([pair], dtype=torch.float64) for pair in ([0.05, 0.95], [0.5, 0.3]))
    writes = [Write(into=direction, coefficients=turned), Write(into=gradient, coefficients=guided)]

    def prepare() -> None:
        torch._foreach_copy_(gradient, fresh)
        torch._foreach_copy_(direction, parameters)

    def plain_measure() -> None:
        products = []
        for g, d in zip(gradient, direction, strict=True):
            x, y = g.view(-1), d.view(-1)
            products += [torch.dot(x, x), torch.dot(x, y), torch.dot(y, y)]
        torch.stack(products).double().view(-1, 3).sum(dim=0)

    def plain_combine() -> None:
        for g, d in zip(gradient, direction, strict=True):
            result = torch.mul(g, 0.5).add_(d, alpha=0.3)
            d.mul_(0.95).add_(g, alpha=0.05)
            g.copy_(result)

    def cases(runs: dict[str, Callable[[], None]]) -> list[Case]:
        return [Case(name=name, prepare=prepare, run=run) for name, run in runs.items()]

    def measure() -> None:
        foreach.gram(Stack(rows, [len(parameters)]))

    def combine() -> None:
        foreach.combine_(Stack(rows, [len(parameters)]), writes)

    return [
        *timed("pass, measure two rows", cases({PORTABLE: measure, PLAIN: plain_measure}), PLAIN, rounds),
        *timed("pass, combine two rows", cases({PORTABLE: combine, PLAIN: plain_combine}), PLAIN, rounds),
    ]


def timed(benchmark: str, cases: list[Case], against: str, rounds: int) -> list[Result]:
    """Milliseconds of each case, and their ratio to those of ``against`` in the same round."""
    return compared(benchmark, time_side_by_side(cases, rounds=rounds, warmup=3, label=benchmark), against)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    results = [*steps(options.rounds), *passes(options.rounds)]
    save(options.out, results, versions())
    for row in results:
        print(f"{row.benchmark:32} {row.provider:18} {row.value:8.2f} {row.unit} ({row.low:.2f} .. {row.high:.2f})")


if __name__ == "__main__":
    main()
