"""Time the capture of a source and the reading of metrics: ``python -m benchmarks.capture`` writes results/capture.csv.

Capture: 1,000 short texts in batches of 8 through MiniLM with a LoRA adapter of rank 8, against the same forward and
backward passes alone. Capture needs no pass per example: the squared gradient of a batch, corrected for its size,
estimates the mean square over examples. Metrics: a training step with ``metrics()`` after it, against the step alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from benchmarks.harness import Case, Result, ratios, save, summarise, time_side_by_side, versions
from gradguide import GradGuide, SourceGradient
from gradguide.demo.config import DEFAULT_MODEL
from gradguide.demo.model import Classifier, add_lora, load_encoder
from gradguide.integrations.peft import lora_parameters

RESULTS = Path(__file__).parent / "results" / "capture.csv"
EXAMPLES, BATCH, TOKENS, CLASSES = 1000, 8, 16, 16
SHARE = "time / forward and backward alone"


def batches(count: int) -> list[dict[str, Tensor]]:
    """Return ``count`` batches of random tokens and labels."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1000, 20000, (BATCH, TOKENS), generator=generator),
            "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
            "labels": torch.randint(CLASSES, (BATCH,), generator=generator),
        }
        for _ in range(count)
    ]


def model_of() -> Classifier:
    """Return MiniLM with a LoRA adapter without zero matrices and a frozen head."""
    encoder, _ = load_encoder(DEFAULT_MODEL)
    model = Classifier(add_lora(encoder), int(encoder.config.hidden_size))  # type: ignore[union-attr, arg-type]
    model.add_head("task", CLASSES, 0)
    model.heads.requires_grad_(False)
    with torch.no_grad():  # as after training: with B = 0 the gradient of A is zero
        for name, parameter in lora_parameters(model):
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


def capture_cases(model: Classifier, rows: list[dict[str, Tensor]]) -> list[Case]:
    """Return capture in its forms, and the forward and backward passes alone."""
    trained = [p for _, p in lora_parameters(model)]

    def loss(_: object, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(model("task", batch), batch["labels"])

    def drawn(_: object, batch: dict[str, Tensor]) -> Tensor:
        logits = model("task", batch)
        labels = torch.multinomial(logits.detach().softmax(dim=1), 1).squeeze(1)
        return cross_entropy(logits, labels)

    def alone() -> None:
        model.eval()
        for batch in rows:
            torch.autograd.grad(loss(model, batch), trained)

    def nothing() -> None:
        return None

    return [
        Case(name="forward and backward alone", prepare=nothing, run=alone),
        Case(name="capture, no curvature", prepare=nothing, run=lambda: _capture(model, rows, loss, False)),
        Case(name="capture, empirical Fisher", prepare=nothing, run=lambda: _capture(model, rows, loss, True)),
        Case(name="capture, true Fisher (two passes)", prepare=nothing, run=lambda: _capture(model, rows, loss, drawn)),
    ]


def _capture(model: Classifier, rows: list[dict[str, Tensor]], loss: object, curvature: object) -> None:
    SourceGradient.capture(model, rows, loss, curvature=curvature)  # type: ignore[arg-type]


def metric_cases(model: Classifier, batch: dict[str, Tensor]) -> list[Case]:
    """Return a training step alone, and with its metrics read."""
    optimizer = GradGuide(AdamW([p for _, p in lora_parameters(model)], lr=0.0))
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model.loss("task", batch).backward()
        optimizer.step()

    def read() -> None:
        step()
        optimizer.metrics()

    def nothing() -> None:
        return None

    return [Case(name="step", prepare=nothing, run=step), Case(name="step, metrics read", prepare=nothing, run=read)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer examples and rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    model = model_of()
    rows = batches(8 if options.quick else EXAMPLES // BATCH)
    rounds = 1 if options.quick else 3
    times = time_side_by_side(
        capture_cases(model, rows), rounds=rounds, warmup=0 if options.quick else 1, label="capture"
    )
    results: list[Result] = []
    for name in times:
        found = ratios(times, name, "forward and backward alone")
        results.append(summarise(f"capture of {len(rows) * BATCH} examples", name, SHARE, "ratio", found))
    metrics = time_side_by_side(
        metric_cases(model, rows[0]), rounds=3 if options.quick else 40, warmup=3, label="metrics"
    )
    shares = [100 * (ratio - 1) for ratio in ratios(metrics, "step, metrics read", "step")]
    results.append(
        summarise("training step of MiniLM, LoRA r8", "metrics read", "share that reading adds", "%", shares)
    )
    save(options.out, results, versions())
    for result in results:
        print(f"{result.provider:36s} {result.value:7.3f} {result.unit} ({result.low:.3f} .. {result.high:.3f})")


if __name__ == "__main__":
    main()
