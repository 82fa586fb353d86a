"""Time each kernel beside a copy of memory: ``python -m benchmarks.bandwidth --out FILE`` (needs a CUDA device).

Memory bandwidth limits every kernel, so its time is compared with the bytes that it moves and with the bandwidth of a
copy in the same run. NOTES.md has the predicted times.
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Case, Result, save, summarise, time_side_by_side, versions
from gradguide.ops import Row, Write
from gradguide.ops import triton as ops
from gradguide.ops.triton.launch_adam import Groups, Moments, Settings, launch_adam, launch_preview_update, plan_adam

ELEMENTS = 1 << 28
"""In 64 tensors. A row in float32 has 1 GiB, which no cache holds."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function to time, and the bytes per element that it moves."""

    run: Callable[[], object]
    bytes: float


def kernels(elements: int, device: torch.device) -> dict[str, Kernel]:
    """Return the copy, and measuring, combining and stepping over gradient, direction and one source."""

    def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return list(torch.full((elements,), 1e-3, dtype=dtype, device=device).chunk(64))

    g, d, s, p, anchor, v = (tensors() for _ in range(6))
    half = tensors(torch.bfloat16)
    plain: list[Row | None] = [Row(offset=g), Row(offset=d)]
    rows: dict[str, list[Row | None]] = {
        "g, d": plain,
        "g, d, s": [*plain, Row(offset=s)],
        "g, d, bf16 s": [*plain, Row(offset=half)],
        "g, d, anchored s": [*plain, Row(scale=s, at=p, anchor=anchor)],
    }
    read = {"g, d": 8.0, "g, d, s": 12.0, "g, d, bf16 s": 10.0, "g, d, anchored s": 20.0}
    settings = [Settings(lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)]
    which = array("q", [0] * len(p))
    groups = Groups(settings=settings, which=which, on_device=False, decoupled=True, maximize=False)
    one = torch.ones(1, dtype=torch.float64, device=device)
    moments = Moments(parameters=p, first=s, second=v, steps=[one.float().squeeze() for _ in p])
    found = {"copy": Kernel(lambda: torch._foreach_copy_(p, g), 8.0)}
    for name, these in rows.items():
        keep = torch.eye(len(these), dtype=torch.float64, device=device)
        # Coefficients for which every row is read, and values hardly change.
        near = keep + 1e-6
        writes = [Write(into=d, coefficients=near[1:2]), Write(into=g, coefficients=near[:1])]
        found[f"measure {name}"] = Kernel(lambda these=these: ops.gram(these), read[name])  # type: ignore[misc]
        found[f"combine {name}"] = Kernel(
            lambda these=these, writes=writes: ops.combine_(these, writes),  # type: ignore[misc]
            read[name] + 8.0,
        )
    # With share_momentum the first moment is the direction; otherwise the direction is a row of its own.
    shared: list[Row | None] = [Row(offset=g), Row(offset=s), Row(offset=half)]
    weights = torch.full((1, 3), 1e-6, dtype=torch.float64, device=device)
    columns = plan_adam(shared, None, moments)
    assert columns is not None
    found["fused step, shared momentum, bf16 s"] = Kernel(
        lambda: launch_adam(columns, shared, weights, None, moments, groups, one, None, one.float()), 30.0
    )
    own: list[Row | None] = [*plain]
    write = Write(into=d, coefficients=weights[:, :2])
    own_columns = plan_adam(own, write, moments)
    assert own_columns is not None
    found["fused step, g, d"] = Kernel(
        lambda: launch_adam(own_columns, own, weights[:, :2], write, moments, groups, one, None, one.float()), 36.0
    )
    found["measure the update, g, d"] = Kernel(
        lambda: launch_preview_update(own_columns, own, weights[:, :2], moments, groups, 2, 0), 20.0
    )
    return found


def measure(rounds: int, elements: int, device: torch.device) -> list[Result]:
    """Return time, bandwidth, and bandwidth over that of the copy, of every kernel."""
    found = kernels(elements, device)

    def cases() -> list[Case]:
        return [Case(name=n, prepare=lambda: None, run=lambda k=k: void(k.run)) for n, k in found.items()]  # type: ignore[misc]

    times = time_side_by_side(cases(), rounds=rounds, warmup=3, label="kernels")
    results = []
    for name, kernel in found.items():
        speeds = [kernel.bytes * elements / t / 1e6 for t in times[name]]
        copies = [found["copy"].bytes * elements / t / 1e6 for t in times["copy"]]
        shares = [100 * mine / copy for mine, copy in zip(speeds, copies, strict=True)]
        results += [
            summarise("kernels", name, "time", "ms", times[name]),
            summarise("kernels", name, "moved at least", "bytes moved per parameter", [kernel.bytes]),
            summarise("kernels", name, "bandwidth", "GB/s", speeds),
            summarise("kernels", name, "share of the copy's bandwidth", "%", shares),
        ]
    return results


def void(run: Callable[[], object]) -> None:
    """Call ``run`` and drop its result."""
    run()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="result file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device, found none")
    results = measure(30, ELEMENTS, torch.device("cuda"))
    save(options.out, results, versions())
    for result in results:
        print(f"{result.provider:40} {result.metric:32} {result.value:10.3f} {result.unit}")


if __name__ == "__main__":
    main()
