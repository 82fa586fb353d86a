"""Time the exact objective: ``python -m benchmarks.objective`` writes results/objective.csv.

A training step of MiniLM with a LoRA adapter of rank 8 (8 texts of 16 tokens) is timed without a regularizer and with
one, side by side. Attention is eager.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import AdamW

from benchmarks.capture import batches, model_of
from benchmarks.harness import Case, save, summarise, time_side_by_side, versions
from gradguide import Direction, GradGuide, Regularizer
from gradguide.demo.model import Classifier
from gradguide.integrations.peft import lora_parameters

RESULTS = Path(__file__).parent / "results" / "objective.csv"
BENCHMARK = "training step of MiniLM, LoRA r8"
RATIO = "time / a step without regularizer"
_RATE = 1e-3  # at which the update's bound is measured, as in training
REGULARIZERS = {"no regularizer": None, "finite differences": Regularizer(direction=0.1, magnitude=0.01)}


def case_of(name: str, regularizer: Regularizer | None, model: Classifier, batch: dict[str, Tensor]) -> Case:
    """Return a training step to time."""
    base = AdamW([p for _, p in lora_parameters(model)], lr=_RATE)
    optimizer = GradGuide(base, direction=Direction(damping=0.0), regularizer=regularizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss("task", batch)
        loss.backward()
        return loss

    return Case(name=name, prepare=lambda: None, run=lambda: optimizer.step(closure))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    model = model_of()
    encoder: Any = model.encoder
    encoder.base_model.model.set_attn_implementation("eager")
    model.train()
    cases = [case_of(name, regularizer, model, batches(1)[0]) for name, regularizer in REGULARIZERS.items()]
    rounds = 3 if options.quick else 40
    times = time_side_by_side(cases, rounds=rounds, warmup=3, label=BENCHMARK)
    plain = times["no regularizer"]
    results = [
        summarise(BENCHMARK, name, RATIO, "ratio", [a / b for a, b in zip(found, plain, strict=True)])
        for name, found in times.items()
    ]
    save(options.out, results, versions())
    for result in results:
        print(f"{result.provider:20s} {result.value:6.2f} ({result.low:.2f} .. {result.high:.2f})")


if __name__ == "__main__":
    main()
