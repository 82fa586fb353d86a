"""Run what needs a CUDA device, tests and benchmarks, in at most eight minutes: ``python -m benchmarks.gpu --out DIR``.

Parts run one after the other, each in its own process, so that a failure does not stop the others. The output of a
part is in ``DIR/<part>.log`` and its results in ``DIR/*.csv``. ``DIR/summary.txt`` lists what passed, failed or was
skipped for lack of time, and how long it took.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gradguide.utils.atomic import atomic_write

LORA = ("LoRA r16 of a 1.1B Llama", "LoRA r64 of a 1.1B Llama", "LoRA r16 of an 8B Llama", "LoRA r16 of a 70B Llama")
OTHERS = ("LoRA r64 of an 8B Llama", "10,000 tiny tensors", "all of a 124M GPT-2")
WHOLE = ("all of a 1.1B Llama", "LoRA r64 of a 70B Llama")


@dataclass(frozen=True, slots=True)
class Part:
    """A command and its time limit in seconds."""

    name: str
    command: list[str]
    seconds: float


def parts(out: Path) -> list[Part]:
    """Return the parts, the most important first."""
    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-m", "gpu and not slow", "-q", "-p", "no:cacheprovider"]
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    step = [*python, "benchmarks.step", "--quick"]
    found = [
        Part("tests", [*tests, *parallel, "tests/gpu", "tests/ops/triton"], 150),
        Part("kernels", [*python, "benchmarks.bandwidth", "--out", str(out / "kernels.csv")], 60),
        Part("step-lora", [*step, "--sets", *LORA, "--out", str(out / "step-lora.csv")], 90),
        Part("step-whole", [*step, "--sets", *WHOLE, "--out", str(out / "step-whole.csv")], 120),
        Part("training", [*python, "benchmarks.llama", "--out", str(out / "training.csv")], 90),
        Part("training-8b", [*python, "benchmarks.llama", "--size", "8B", "--out", str(out / "training-8b.csv")], 90),
        Part("peers", [*python, "benchmarks.peers", "--out", str(out / "peers.csv")], 60),
        Part("step-others", [*step, "--sets", *OTHERS, "--out", str(out / "step-others.csv")], 90),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        # compute-sanitizer is slow and does not support CUDA graphs, so it runs the tests of kernel values only.
        checked = [sanitizer, "--error-exitcode", "1", *tests, "tests/ops/triton/test_values.py"]
        found.insert(2, Part("sanitizer", checked, 120))
    return found


def run(part: Part, out: Path, left: float) -> str:
    """Run a part, and return its outcome in words."""
    if left <= 10:
        return "skipped: no time left"
    start = time.monotonic()
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                part.command, stdout=log, stderr=subprocess.STDOUT, timeout=min(part.seconds, left), check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {time.monotonic() - start:.0f} s"
    return f"{'passed' if code == 0 else f'failed with {code}'} in {time.monotonic() - start:.0f} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run these parts only")
    parser.add_argument("--seconds", type=float, default=470.0, help="for all parts (default: %(default)s)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this suite needs a CUDA device, found none")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    chosen = [part for part in parts(out) if options.parts is None or part.name in options.parts]
    lines = [f"device: {torch.cuda.get_device_name()}, torch {torch.__version__}"]
    if shutil.which("compute-sanitizer") is None:
        lines.append("sanitizer: skipped, compute-sanitizer is not installed")
    for part in chosen:
        lines.append(f"{part.name}: {run(part, out, end - time.monotonic())}")
        print(lines[-1], flush=True)
        with atomic_write(out / "summary.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any("failed" in line or "stopped" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
