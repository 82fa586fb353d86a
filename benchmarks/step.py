"""Time a guided step: ``python -m benchmarks.step`` writes results/step.csv.

Every provider steps the same parameters with the same gradients, in turns within one run. Before each step gradients
are filled again, as by a backward pass; that time is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.graphs import Graph
from benchmarks.harness import BASELINE, Case, Result, held_bytes, ratios, save, summarise, time_side_by_side, versions
from benchmarks.sets import SETS, Set
from benchmarks.training import minilm_step
from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient

RESULTS = Path(__file__).parent / "results" / "step.csv"


class Provider:
    """An optimizer over its own parameters, with the shared gradients."""

    def __init__(self, name: str, problem: Problem, option: Option, clip: bool) -> None:
        generator = torch.Generator(problem.device).manual_seed(0)
        self.name = name
        self.named = [
            (f"layer{i}", torch.nn.Parameter(torch.randn(s, generator=generator, device=problem.device) * 0.02))
            for i, s in enumerate(problem.shapes)
        ]
        for _, parameter in self.named:
            parameter.grad = torch.zeros_like(parameter)
        self._gradients = problem.gradients
        self._filled = 0
        self._clip = clip
        before = held_bytes()
        self.optimizer = option.make(list(self.named))
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


class Problem:
    """Gradients and source tables over the shapes of a set, shared by all providers."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device, batches: int) -> None:
        generator = torch.Generator(device).manual_seed(1)

        def draw(scale: float) -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device) * scale for shape in shapes]

        self.shapes = shapes
        self.device = device
        shared = draw(1e-3)
        self.gradients = [[s + n for s, n in zip(shared, draw(1e-3), strict=True)] for _ in range(batches)]
        self.s0, self.fisher = draw(1e-3), [f.abs() for f in draw(1e-6)]

    def source(
        self, named: list[tuple[str, Tensor]], *, moving: bool, dtype: torch.dtype = torch.float32
    ) -> SourceGradient:
        """Return a new source for one provider, so that its memory is counted."""
        names = [name for name, _ in named]

        def table(tensors: list[Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(dtype, copy=True) for name, tensor in zip(names, tensors, strict=True)}

        if not moving:
            return SourceGradient(table(self.s0))
        anchor = {name: p.detach().clone() for name, p in named}
        return SourceGradient(table(self.s0), fisher=table(self.fisher), anchor=anchor)


def base(named: list[tuple[str, Tensor]], *, fused: bool = True, lr: float = 1e-3, capturable: bool = False) -> AdamW:
    return AdamW([p for _, p in named], lr=lr, fused=fused, foreach=not fused, capturable=capturable)


@dataclass(frozen=True, slots=True)
class Option:
    """Makes a provider's optimizer; ``floor`` is the least number of bytes per parameter that it moves in float32."""

    make: Callable[[list[tuple[str, Tensor]]], Optimizer | Graph]
    floor: float


def options(problem: Problem) -> dict[str, Option]:
    """Return the base, the base after clipping, and GradGuide with each mechanism and with combinations of them.

    AdamW moves 28 bytes per parameter (it reads p, g, m, v and writes p, m, v); clipping reads g, then reads and
    writes it. GradGuide reads every row to measure and to combine, and writes g and d.
    """
    plain = Magnitude(max_update=None)
    found = {
        "AdamW(fused)": Option(base, 28),
        BASELINE: Option(base, 40),
        "clipping": Option(lambda n: GradGuide(base(n), direction=None, magnitude=plain), 40),
        "direction": Option(lambda n: GradGuide(base(n), direction=Direction(), magnitude=None), 52),
        "direction + clipping": Option(lambda n: GradGuide(base(n), direction=Direction(), magnitude=plain), 52),
        "direction (shared momentum) + clipping": Option(
            lambda n: GradGuide(base(n), direction=Direction(share_momentum=True), magnitude=plain), 48
        ),
        "direction + source + clipping": Option(
            lambda n: GradGuide(
                base(n),
                direction=Direction(),
                alignment=Alignment(problem.source(n, moving=False), on="gradient", weight=1.0),
                magnitude=plain,
                names=n,
            ),
            60,
        ),
        "direction + moving source + clipping": Option(
            lambda n: GradGuide(
                base(n),
                direction=Direction(),
                alignment=Alignment(problem.source(n, moving=True), on="gradient", weight=1.0),
                magnitude=plain,
                names=n,
            ),
            84,
        ),
        "defaults, no source": Option(lambda n: GradGuide(base(n)), 56),
        "defaults, anchored source": Option(
            lambda n: GradGuide(base(n), alignment=Alignment(problem.source(n, moving=True).anchored()), names=n), 80
        ),
        "direction + defaults, no source": Option(lambda n: GradGuide(base(n), direction=Direction()), 68),
        "direction + defaults, anchored source": Option(
            lambda n: GradGuide(
                base(n),
                direction=Direction(),
                alignment=Alignment(problem.source(n, moving=True).anchored()),
                names=n,
            ),
            92,
        ),
    }
    return found | low_rate(problem) | (kernels(problem) if problem.device.type == "cuda" else {})


def low_rate(problem: Problem) -> dict[str, Option]:
    """Return the defaults at a rate at which the update is within its bound for sure, so that it is not measured."""
    return {
        "defaults at a rate of 5e-5, no source": Option(lambda n: GradGuide(base(n, lr=5e-5)), 40),
        "defaults at a rate of 5e-5, anchored source": Option(
            lambda n: GradGuide(
                base(n, lr=5e-5), alignment=Alignment(problem.source(n, moving=True).anchored()), names=n
            ),
            64,
        ),
    }


def graphs() -> dict[str, Option]:
    """Return the baseline and the defaults as CUDA graphs."""

    def plain(named: list[tuple[str, Tensor]]) -> Graph:
        optimizer = base(named, capturable=True)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            optimizer.step()

        return Graph(step)

    return {
        f"CUDA graph of {BASELINE}": Option(plain, 40),
        "CUDA graph of the defaults, no source": Option(lambda n: Graph(GradGuide(base(n, capturable=True)).step), 48),
    }


def kernels(problem: Problem) -> dict[str, Option]:
    """Return the providers for CUDA only: the portable backend, CUDA graphs, and kernels without the fused step."""
    plain = Magnitude(max_update=None)

    def guided(n: list[tuple[str, Tensor]], backend: str, *, fused: bool = True) -> GradGuide:
        alignment = Alignment(problem.source(n, moving=False), on="gradient", weight=1.0)
        # A hook on the base prevents the fused step, even if it does nothing.
        optimizer = base(n)
        if not fused:
            optimizer.register_step_post_hook(lambda *_: None)
        return GradGuide(
            optimizer, direction=Direction(), alignment=alignment, magnitude=plain, names=n, backend=backend
        )

    def shared(n: list[tuple[str, Tensor]]) -> GradGuide:
        source = problem.source(n, moving=False, dtype=torch.bfloat16)
        return GradGuide(
            base(n),
            direction=Direction(share_momentum=True),
            alignment=Alignment(source, on="gradient", weight=1.0),
            magnitude=plain,
            names=n,
        )

    return {
        "clip_grad_norm_ + AdamW(foreach)": Option(lambda n: base(n, fused=False), 40),
        "direction + source + clipping, foreach": Option(lambda n: guided(n, "foreach"), 60),
        "direction + source + clipping, not fused": Option(lambda n: guided(n, "triton", fused=False), 60),
        "shared momentum + bf16 source + clipping": Option(shared, 40),
        **graphs(),
    }


# The fused step neither writes g nor reads it again, and changes the update without a copy of the parameters.
# If a rule acts on the update, everything that the step reads is read once more to measure the update.
FUSED_FLOORS = {
    "defaults, no source": 48,
    "defaults, anchored source": 72,
    "direction + defaults, no source": 64,
    "direction + defaults, anchored source": 92,
    "defaults at a rate of 5e-5, no source": 32,
    "defaults at a rate of 5e-5, anchored source": 52,
    "clipping": 32,
    "direction": 44,
    "direction + clipping": 44,
    "direction (shared momentum) + clipping": 36,
    "direction + source + clipping": 52,
    "direction + moving source + clipping": 72,
}


def time_set(chosen: Set, rounds: int, device: torch.device) -> list[Result]:
    """Return time, ratio to the baseline, bytes held and least bytes moved, of every provider.

    If the set is all of a large model, each provider is timed beside its own baseline.
    """
    problem = Problem(chosen.shapes, device, batches=1 if chosen.whole else 3)
    found = options(problem)
    groups = [[BASELINE, name] for name in found if name != BASELINE] if chosen.whole else [list(found)]
    results = []
    for names in groups:
        made = {name: Provider(name, problem, found[name], name.startswith("clip_grad_norm_")) for name in names}
        times = time_side_by_side([p.case for p in made.values()], rounds=rounds, warmup=5, label=chosen.name)
        # The two rows of AdamW's state are not a cost of GradGuide.
        for name, provider in made.items():
            mine = times[name]
            extra = (provider.bytes - made[BASELINE].bytes) / chosen.elements
            floor = float(FUSED_FLOORS.get(name, found[name].floor) if device.type == "cuda" else found[name].floor)
            results += [
                summarise(chosen.name, name, "time", "ms", mine),
                summarise(chosen.name, name, f"time / {BASELINE}", "ratio", ratios(times, name, BASELINE)),
                summarise(chosen.name, name, "memory beyond AdamW, sources included", "bytes per parameter", [extra]),
                summarise(chosen.name, name, "moved at least", "bytes moved per parameter", [floor]),
            ]
        del made
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = next(iter(SETS))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a minute on a CPU, less precise")
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=list(SETS),
        default=list(SETS) if device.type == "cuda" else [first],
        help="(default: all on CUDA, the first on a CPU)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    chosen = parser.parse_args(argv)
    rounds = 15 if chosen.quick else 60
    results = [result for name in chosen.sets for result in time_set(SETS[name], rounds, device)]
    if device.type == "cpu":
        results += minilm_step(rounds, "training step of MiniLM, LoRA r8")
    save(chosen.out, results, versions())
    for result in results:
        spread = f"({result.low:.3f} .. {result.high:.3f})"
        print(
            f"{result.benchmark:34} {result.provider:40} {result.metric:44} {result.value:.3f} {result.unit} {spread}"
        )


if __name__ == "__main__":
    main()
