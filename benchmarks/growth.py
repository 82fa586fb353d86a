"""Compute how the cost of a step grows with the model: ``python -m benchmarks.growth`` writes results/growth.csv.

Nothing is measured: bytes are those of ``benchmarks.step``, launches those that tests count, and the work of a
structured source is that of its matrix products. LoRA of rank 16 on all linear layers, a source of rank 64 in bfloat16,
2,048 tokens per step. What more ranks cost does not depend on the model: see ``benchmarks.communication``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import BASELINE, save, versions
from benchmarks.sets import LLAMAS, Llama, lora
from benchmarks.step import FUSED_FLOORS

RESULTS = Path(__file__).parent / "results" / "growth.csv"
ADAPTER, SOURCE, TOKENS = 16, 64, 2048
"""Rank of the adapter, total rank of a source's two pairs of factors, and tokens per step."""

BASE_BYTES = 40
"""Bytes per parameter of clipping and AdamW in float32."""

KERNELS = 8
"""Launches of GradGuide's defaults, whatever the number of tensors: ``tests/ops/triton/test_launch.py`` counts them."""

PULL_CALLS = 147
"""Calls into torch of the pull on a Llama: ``tests/sources/structured/test_calls.py`` counts them."""

TENSORS_PER_LAUNCH = {"norm": 110, "multiply": 110, "adam": 36, "count": 110}
"""Most tensors that torch handles in a launch, in builds for CUDA 12: ``MultiTensorApply.cuh``."""

PROVIDERS = {
    BASELINE: BASE_BYTES,
    "defaults, no source": FUSED_FLOORS["defaults, no source"],
    # The pull is a stored row: it is written once, and read to measure, to preview the update, and to step.
    "defaults, structured source": FUSED_FLOORS["defaults, no source"] + 4 * 4,
}
"""Bytes per trained parameter of each provider. The factors of a source are apart, see ``Growth``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One model and provider.

    trained, tensors: number of trained parameters, and of their tensors.
    moved: bytes that a step moves at least, without reading the factors of a source.
    ratio: these over the baseline's.
    held: bytes that are kept beyond AdamW's state.
    launches: launches on CUDA; of the baseline at least, of a structured source with its calls into torch.
    pull_share: floating point operations of the pull over those of forward and backward passes.
    adapter: bytes of an adapter of the source's rank in bfloat16, to compare with ``held``.
    """

    model: str
    provider: str
    trained: int
    tensors: int
    moved: int
    ratio: float
    held: int
    launches: int
    pull_share: float
    adapter: int


def growth(name: str, model: Llama) -> list[Growth]:
    """Return the costs of each provider."""
    shapes = lora(model.linears, ADAPTER)
    trained = sum(a * b for a, b in shapes)
    ends = sum(map(sum, model.linears))
    adapter = 2 * SOURCE * ends
    # Two pairs of factors of half the rank, and the diagonal of each in bfloat16.
    source = adapter + 2 * 2 * ends
    found = []
    for provider, per_parameter in PROVIDERS.items():
        structured = "structured" in provider
        held = source + 4 * trained if structured else 0
        launches = torch_launches(len(shapes)) if provider == BASELINE else KERNELS + (PULL_CALLS if structured else 0)
        found.append(
            Growth(
                model=name,
                provider=provider,
                trained=trained,
                tensors=len(shapes),
                moved=per_parameter * trained,
                ratio=per_parameter / BASE_BYTES,
                held=held,
                launches=launches,
                pull_share=pull_operations(model) / pass_operations(model) if structured else 0.0,
                adapter=adapter,
            )
        )
    return found


def torch_launches(tensors: int) -> int:
    """Return the least number of launches of clipping and fused AdamW over ``tensors`` tensors."""
    return sum(-(-tensors // most) for most in TENSORS_PER_LAUNCH.values())


def pull_operations(model: Llama) -> float:
    """Return the floating point operations of the pull: A S, G B, their product, and the gradients of A and B.

    The factors of both pairs have ``SOURCE`` columns together, and each pair has its own products with A and B.
    """
    total = 0.0
    for ins, outs in model.linears:
        factors = 2 * 2 * ADAPTER * (ins + outs) * SOURCE  # two thin products each for A S and G B
        gradients = 2 * 2 * ADAPTER**2 * 2 * (ins + outs)  # for each of two pairs
        total += factors + gradients
    return total


def pass_operations(model: Llama) -> float:
    """Return the floating point operations of forward and backward passes over ``TOKENS`` tokens.

    The frozen weights have no gradient of their own, so each takes part in two products, as does the output layer.
    Adapters take part in three. Attention between tokens is left out.
    """
    weights = sum(ins * outs for ins, outs in model.linears) + model.vocabulary * model.hidden
    adapters = sum(ADAPTER * (ins + outs) for ins, outs in model.linears)
    return 2.0 * TOKENS * (2 * weights + 3 * adapters)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    save(options.out, [row for name, model in LLAMAS.items() for row in growth(name, model)], versions())
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
