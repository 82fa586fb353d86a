"""Time GradGuide beside other ways to reconcile gradients: ``python -m benchmarks.peers`` writes results/peers.csv.

Each gets the same vectors (gradient and source gradient of a LoRA set, one tensor per parameter) and writes the
reconciled gradient into ``.grad``. Conversions that a package needs (to a matrix or a flat vector) are part of its
time. Packages that are not installed (``pip install -e '.[bench]'``) are skipped.

- UPGrad, PCGrad of TorchJD (arXiv 2406.16232): aggregators of a matrix with a row per objective.
- PCGrad of pytorch_optimizer (arXiv 2001.06782).
- A-GEM (arXiv 1812.00420): flat vectors, one product read by the host, and a projection if it is negative, as in
  Avalanche's plugin.
- ZClip (arXiv 2504.02507): uses no second gradient; clips the norm if it is far above its running mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Result, compared, save, time_side_by_side, versions
from benchmarks.sets import SETS, Set
from benchmarks.zclip import ZClip
from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient

RESULTS = Path(__file__).parent / "results" / "peers.csv"

OURS = "GradGuide, direction + source + clipping"

Run = Callable[[], None]


class Vectors:
    """Parameters, and the two gradients that every peer gets before each run."""

    def __init__(self, chosen: Set, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw() -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device) * 1e-3 for shape in chosen.shapes]

        self.parameters = [nn.Parameter(tensor) for tensor in draw()]
        self.gradient, self.source = draw(), draw()
        # The two conflict, so that every peer has to project.
        torch._foreach_sub_(self.source, self.gradient, alpha=0.5)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    @property
    def grads(self) -> list[Tensor]:
        """Return the gradients of the parameters."""
        return [p.grad for p in self.parameters if p.grad is not None]

    def fill(self) -> None:
        """Copy the gradient into ``.grad``."""
        torch._foreach_copy_(self.grads, self.gradient)

    def put(self, flat: Tensor) -> None:
        """Copy a flat vector into the gradients."""
        parts = flat.split([g.numel() for g in self.grads])
        torch._foreach_copy_(self.grads, [part.view_as(g) for part, g in zip(parts, self.grads, strict=True)])


def flat(tensors: list[Tensor]) -> Tensor:
    """Return ``tensors`` as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradguide(vectors: Vectors) -> Run:
    """GradGuide around SGD at rate 0, whose step is part of the time."""
    named = [(f"p{i}", p) for i, p in enumerate(vectors.parameters)]
    source = SourceGradient({name: s for (name, _), s in zip(named, vectors.source, strict=True)})
    base = torch.optim.SGD(vectors.parameters, lr=0.0, fused=True)
    alignment = Alignment(source, on="gradient", weight=0.0)
    optimizer = GradGuide(
        base, direction=Direction(), alignment=alignment, magnitude=Magnitude(max_update=None), names=named
    )
    return lambda: void(optimizer.step())


def torchjd(name: str, vectors: Vectors) -> Run:
    """Stack gradient and source to a matrix, and call the aggregator ``name`` of TorchJD."""
    aggregator = getattr(import_module("torchjd.aggregation"), name)()
    return lambda: vectors.put(aggregator(torch.stack([flat(vectors.grads), flat(vectors.source)])))


def pytorch_optimizer(vectors: Vectors) -> Run:
    """Flatten gradients by task, then call ``project_conflicting``, the part of PCGrad after the backward passes."""
    kind = import_module("pytorch_optimizer").PCGrad
    surgery = kind(torch.optim.SGD(vectors.parameters, lr=0.0))
    masks = [[torch.ones_like(g) for g in vectors.grads]] * 2

    def run() -> None:
        tasks = [flat(vectors.grads), flat(vectors.source)]
        vectors.put(surgery.project_conflicting(tasks, [flat(mask) for mask in masks]))

    return run


def a_gem(vectors: Vectors) -> Run:
    """Project the flat gradient if it conflicts with the source."""

    def run() -> None:
        g, s = flat(vectors.grads), flat(vectors.source)
        inner = torch.dot(g, s)
        if inner < 0:
            vectors.put(g - inner / torch.dot(s, s) * s)

    return run


def zclip(vectors: Vectors) -> Run:
    """ZClip after its warm-up, during which it does not clip."""
    clip = ZClip(vectors.parameters)
    for _ in range(ZClip.WARM_UP):
        vectors.fill()
        clip()
    return clip


PEERS: dict[str, Callable[[Vectors], Run]] = {
    OURS: gradguide,
    "TorchJD UPGrad": lambda v: torchjd("UPGrad", v),
    "TorchJD PCGrad": lambda v: torchjd("PCGrad", v),
    "pytorch_optimizer PCGrad": pytorch_optimizer,
    "A-GEM": a_gem,
    "ZClip (no source)": zclip,
}


def void(value: object) -> None:
    """Drop the value that a step returns."""


def compare(chosen: Set, rounds: int, device: torch.device) -> list[Result]:
    """Return the time of every peer that is installed, and its ratio to GradGuide's."""
    vectors = Vectors(chosen, device)
    cases = []
    for name, make in PEERS.items():
        try:
            run = make(vectors)
        except ImportError as error:
            print(f"{name} is skipped: {error}")
            continue
        cases.append(Case(name=name, prepare=vectors.fill, run=run))
    times = time_side_by_side(cases, rounds=rounds, warmup=3, label=chosen.name)
    return compared(chosen.name, times, OURS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=list(SETS), default=next(iter(SETS)), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = compare(SETS[options.set], options.rounds, device)
    save(options.out, results, versions())
    for result in results:
        print(f"{result.provider:44} {result.metric:54} {result.value:9.3f} {result.unit}")


if __name__ == "__main__":
    main()
