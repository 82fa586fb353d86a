"""Measure the share that GradGuide adds to a training step of a Llama: ``python -m benchmarks.llama --out FILE``.

Random weights in bfloat16, LoRA of rank 16 on all linear layers, batch 4 x 512 tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.harness import save, versions
from benchmarks.sets import LLAMAS
from benchmarks.training import llama_step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--size", choices=tuple(LLAMAS), default="1.1B", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, help="use fewer to try it on a CPU")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 512), help="sequences, tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequences, tokens = options.batch
    layers = f" cut to {options.layers} layers" if options.layers else ""
    label = f"training step of a {options.size} Llama{layers}, LoRA r16, {sequences} x {tokens} tokens"
    results = llama_step(
        options.rounds, label, device, size=options.size, layers=options.layers, batch=(sequences, tokens)
    )
    save(options.out, results, versions())
    for result in results:
        print(f"{result.provider:40} {result.metric:40} {result.value:10.3f} {result.unit}")


if __name__ == "__main__":
    main()
