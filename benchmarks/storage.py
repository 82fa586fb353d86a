"""What sources cost by number and storage: ``python -m benchmarks.storage`` writes results/storage.csv.

The two passes of a step, measure and combine, over gradient, direction and K sources without curvature, all of which
have a say in what is written. The set is LoRA of a 1.1B Llama; K sources are that many rows beside the two. Products
among the sources are kept from the first step on, as GradGuide keeps them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Case, Result, save, summarise, time_side_by_side, versions
from benchmarks.sets import SETS
from gradguide import SourceGradient
from gradguide.ops import Row, Stack, Write, select
from gradguide.ops.fixed import FixedProducts
from gradguide.ops.pack import lay_out

RESULTS = Path(__file__).parent / "results" / "storage.csv"
BASE = "1 source, float32"
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8 bits": torch.int8}
RATIO = f"measure and combine, time / {BASE}"
BYTES = "sources, bytes per parameter"


def sources_of(shapes: list[tuple[int, ...]], count: int, dtype: torch.dtype) -> list[SourceGradient]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        table = {f"p{i}": torch.randn(shape, generator=generator) * 1e-3 for i, shape in enumerate(shapes)}
        source = SourceGradient(table if dtype == torch.int8 else {name: t.to(dtype) for name, t in table.items()})
        found.append(source.quantized() if dtype == torch.int8 else source)
    return found


def bytes_of(sources: list[SourceGradient]) -> int:
    tables = [table for source in sources for table in source._tables.values()]
    return sum(t.numel() * t.element_size() for table in tables for t in table.values())


def case_of(name: str, parameters: list[Tensor], fresh: list[Tensor], sources: list[SourceGradient]) -> Case:
    gradient, direction = lay_out(parameters), lay_out(parameters)
    torch._foreach_copy_(direction, fresh)
    names, products = [f"p{i}" for i in range(len(parameters))], FixedProducts()
    ops = select("auto", parameters[0].device)

    def prepare() -> None:
        torch._foreach_copy_(gradient, fresh)

    def run() -> None:
        rows = Stack([Row(offset=gradient), Row(offset=direction), *(s.row(names, parameters) for s in sources)])
        gram = products.gram(ops, rows)
        shared = torch.full((1, len(rows)), 1e-3, dtype=gram.dtype)
        writes = [Write(into=direction, coefficients=gram.new_tensor([[0.05, 0.95] + [0.0] * len(sources)]))]
        ops.combine_(rows, [*writes, Write(into=gradient, coefficients=shared)])

    return Case(name=name, prepare=prepare, run=run)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small tensor, few rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    chosen = next(iter(SETS.values()))
    shapes: list[tuple[int, ...]] = [(64, 64)] if options.quick else chosen.shapes
    parameters = [torch.randn(shape) * 0.02 for shape in shapes]
    fresh = [torch.randn(shape) * 1e-3 for shape in shapes]
    elements = sum(p.numel() for p in parameters)
    cases, held = [], {}
    for count in (1, 4, 16):
        for kind, dtype in KINDS.items():
            name = f"{count} source{'s' if count > 1 else ''}, {kind}"
            sources = sources_of(shapes, count, dtype)
            held[name] = bytes_of(sources) / elements
            cases.append(case_of(name, parameters, fresh, sources))
    times = time_side_by_side(cases, rounds=3 if options.quick else 20, warmup=2, label="storage")
    results: list[Result] = []
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times[BASE], strict=True)]
        results += [
            summarise(chosen.name, name, "measure and combine", "ms", found),
            summarise(chosen.name, name, RATIO, "ratio", ratios),
            summarise(chosen.name, name, BYTES, "bytes per parameter", [held[name]]),
        ]
    save(options.out, results, versions())
    for result in results:
        print(f"{result.provider:24s} {result.metric:48s} {result.value:8.2f} ({result.low:.2f} .. {result.high:.2f})")


if __name__ == "__main__":
    main()
