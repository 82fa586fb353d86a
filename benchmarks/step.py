"""What a guided step costs: ``python -m benchmarks.step`` writes results/step.csv.

Every provider steps the same parameters with the same gradients, in turns within one run. Gradients are filled anew
before each step, untimed, as a backward pass would.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from benchmarks.harness import Case, Result, held_bytes, save, summarise, time_side_by_side, versions
from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient

RESULTS = Path(__file__).parent / "results" / "step.csv"
BASELINE = "clip_grad_norm_ + AdamW(fused)"


def llama_lora_shapes(
    layers: int = 22, hidden: int = 2048, inner: int = 5632, kv: int = 256, rank: int = 16
) -> list[tuple[int, int]]:
    """Shapes of the LoRA matrices on all linear layers of a Llama; the defaults are those of a model of 1.1B."""
    linears = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    return [shape for _ in range(layers) for ins, outs in linears for shape in ((rank, ins), (outs, rank))]


class Provider:
    """Parameters of its own, an optimizer over them, and the shared gradients."""

    def __init__(
        self,
        name: str,
        shapes: list[tuple[int, int]],
        gradients: list[list[Tensor]],
        make: Callable[[list[tuple[str, Tensor]]], Optimizer],
        clip: bool,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name = name
        self.named = [
            (f"layer{i}", torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02)) for i, s in enumerate(shapes)
        ]
        for _, parameter in self.named:
            parameter.grad = torch.zeros_like(parameter)
        self._gradients = gradients
        self._filled = 0
        self._clip = clip
        before = held_bytes()
        self.optimizer = make(list(self.named))
        self.case.prepare()
        self.case.run()
        self.bytes = held_bytes() - before

    @property
    def case(self) -> Case:
        return Case(name=self.name, prepare=self._prepare, run=self._run)

    def _prepare(self) -> None:
        fresh = self._gradients[self._filled % len(self._gradients)]
        self._filled += 1
        torch._foreach_copy_([p.grad for _, p in self.named if p.grad is not None], fresh)

    def _run(self) -> None:
        if self._clip:
            torch.nn.utils.clip_grad_norm_([p for _, p in self.named], 1.0)
        self.optimizer.step()


def base(named: list[tuple[str, Tensor]]) -> AdamW:
    return AdamW([p for _, p in named], lr=1e-3, fused=True)


def providers(shapes: list[tuple[int, int]]) -> list[Provider]:
    """The base, the base after clipping, and GradGuide with each mechanism alone and together."""
    generator = torch.Generator().manual_seed(1)

    def draw(scale: float) -> list[Tensor]:
        return [torch.randn(shape, generator=generator) * scale for shape in shapes]

    shared = draw(1e-3)
    gradients = [[s + n for s, n in zip(shared, draw(1e-3), strict=True)] for _ in range(3)]
    s0, fisher = draw(1e-3), [f.abs() for f in draw(1e-6)]

    def source(named: list[tuple[str, Tensor]], *, moving: bool) -> SourceGradient:
        names = [name for name, _ in named]
        if not moving:
            return SourceGradient(dict(zip(names, (s.clone() for s in s0), strict=True)))
        anchor = {name: p.detach().clone() for name, p in named}
        copies = ([t.clone() for t in table] for table in (s0, fisher))
        first, second = (dict(zip(names, table, strict=True)) for table in copies)
        return SourceGradient(first, fisher=second, anchor=anchor)

    clipping = Magnitude(max_update=None)
    makes: dict[str, Callable[[list[tuple[str, Tensor]]], Optimizer]] = {
        "AdamW(fused)": base,
        BASELINE: base,
        "clipping": lambda n: GradGuide(base(n), direction=None, magnitude=clipping),
        "magnitude": lambda n: GradGuide(base(n), direction=None),
        "direction": lambda n: GradGuide(base(n), magnitude=None),
        "direction + clipping": lambda n: GradGuide(base(n), magnitude=clipping),
        "direction (shared momentum) + clipping": lambda n: GradGuide(
            base(n), direction=Direction(share_momentum=True), magnitude=clipping
        ),
        "direction + source + clipping": lambda n: GradGuide(
            base(n),
            alignment=Alignment(source(n, moving=False), on="gradient", weight=1.0),
            magnitude=clipping,
            names=n,
        ),
        "direction + moving source + clipping": lambda n: GradGuide(
            base(n), alignment=Alignment(source(n, moving=True), on="gradient", weight=1.0), magnitude=clipping, names=n
        ),
        "defaults, no source": lambda n: GradGuide(base(n)),
        "defaults, anchored source": lambda n: GradGuide(
            base(n), alignment=Alignment(source(n, moving=True).anchored()), names=n
        ),
    }
    return [Provider(name, shapes, gradients, make, name == BASELINE) for name, make in makes.items()]


def lora_step(rounds: int, shapes: list[tuple[int, int]], label: str) -> list[Result]:
    """Times, ratios to the baseline and bytes per parameter of every provider."""
    found = providers(shapes)
    times = time_side_by_side([p.case for p in found], rounds=rounds, warmup=5, label=label)
    count = sum(a * b for a, b in shapes)
    reference = found[0].bytes
    results = []
    for provider in found:
        mine = times[provider.name]
        ratios = [m / b for m, b in zip(mine, times[BASELINE], strict=True)]
        extra = (provider.bytes - reference) / count
        results.append(summarise(label, provider.name, "time", "ms", mine))
        results.append(summarise(label, provider.name, f"time / {BASELINE}", "ratio", ratios))
        results.append(
            summarise(label, provider.name, "memory beyond AdamW, sources included", "bytes per parameter", [extra])
        )
    return results


def training_step(rounds: int, label: str) -> list[Result]:
    """Whole training steps of all-MiniLM-L6-v2 with LoRA on all linear layers, and the share that guiding adds.

    The batch has 16 texts of 32 tokens. Forward with backward, and the optimizer's part, are timed apart in each step.
    """
    from gradguide.demo.model import DEFAULT_MODEL, Classifier, add_lora, load_encoder
    from gradguide.integrations.peft import lora_parameters

    encoder, _ = load_encoder(DEFAULT_MODEL)
    model = Classifier(add_lora(encoder, seed=0), 384)
    model.add_head("target", 15, 0)
    model.train()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 20000, (16, 32), generator=generator),
        "attention_mask": torch.ones(16, 32, dtype=torch.long),
        "labels": torch.randint(15, (16,), generator=generator),
    }
    named = lora_parameters(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    anchor = {name: p.detach().clone() for name, p in named}
    zeros = {name: torch.zeros_like(p) for name, p in anchor.items()}
    fisher = {name: torch.full_like(p, 1e-6) for name, p in anchor.items()}
    moving = SourceGradient(zeros, fisher=fisher, anchor=anchor)

    def adamw() -> AdamW:
        return AdamW(trained, lr=0.0, fused=True)  # rate 0: every provider meets the same gradients

    optimizers: dict[str, Optimizer] = {
        BASELINE: adamw(),
        "direction + source + clipping": GradGuide(
            adamw(),
            alignment=Alignment(SourceGradient(fisher), on="gradient", weight=1.0),
            magnitude=Magnitude(max_update=None),
            names=named,
        ),
        "defaults, no source": GradGuide(adamw()),
        "defaults, anchored source": GradGuide(adamw(), alignment=Alignment(moving.anchored()), names=named),
    }
    whole: dict[str, list[float]] = {name: [] for name in optimizers}
    part: dict[str, list[float]] = {name: [] for name in optimizers}
    for index in tqdm(range(rounds + 5), desc=label, leave=False):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            model.loss("target", batch).backward()
            backward = time.perf_counter()
            if name == BASELINE:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            end = time.perf_counter()
            if index >= 5:
                whole[name].append(1e3 * (end - start))
                part[name].append(1e3 * (end - backward))
    results = [summarise(label, "model", "trained parameters", "count", [float(count)])]
    for name in optimizers:
        added = [100 * (a - b) / t for a, b, t in zip(part[name], part[BASELINE], whole[name], strict=True)]
        results.append(summarise(label, name, "whole step", "ms", whole[name]))
        results.append(summarise(label, name, "optimizer's part", "ms", part[name]))
        results.append(summarise(label, name, "share of the step that guiding adds", "%", added))
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: a minute, and figures that are less sure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    rounds = 15 if options.quick else 60
    results = lora_step(rounds, llama_lora_shapes(), "LoRA r16 of a 1.1B Llama")
    results += training_step(rounds, "training step of MiniLM, LoRA r8")
    save(options.out, results, versions())
    for result in results:
        spread = f"({result.low:.3f} .. {result.high:.3f})"
        print(
            f"{result.benchmark:34} {result.provider:40} {result.metric:44} {result.value:.3f} {result.unit} {spread}"
        )


if __name__ == "__main__":
    main()
