"""Everything that needs a CUDA device, in one command of at most ten minutes: ``python -m benchmarks.gpu --out DIR``.

Parts run one after the other, each in a process of its own, so that one that fails takes no other with it. What each
printed is in ``DIR/<part>.log``, results in ``DIR/*.csv``, and ``DIR/summary.txt`` says what passed and how long it
took. A part that would begin after the time is up is left out, and said to be.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gradguide.utils.atomic import replacing

BUDGET = 570.0
"""Seconds for all parts."""

LORA = ("LoRA r16 of a 1.1B Llama", "LoRA r64 of a 1.1B Llama", "LoRA r16 of an 8B Llama", "LoRA r16 of a 70B Llama")
OTHERS = ("LoRA r64 of an 8B Llama", "10,000 tiny tensors", "all of a 124M GPT-2")
WHOLE = ("all of a 1.1B Llama", "LoRA r64 of a 70B Llama")


@dataclass(frozen=True, slots=True)
class Part:
    """A command, and the most seconds that it may take."""

    name: str
    command: list[str]
    seconds: float


def parts(out: Path) -> list[Part]:
    """The suite, what matters most first."""
    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-m", "gpu and not slow", "-q", "-p", "no:cacheprovider"]
    step = [*python, "benchmarks.step", "--quick"]
    found = [
        Part("tests", [*tests, "tests/gpu", "tests/ops/triton"], 200),
        Part("kernels", [*python, "benchmarks.bandwidth", "--out", str(out / "kernels.csv")], 60),
        Part("step-lora", [*step, "--sets", *LORA, "--out", str(out / "step-lora.csv")], 90),
        Part("step-whole", [*step, "--sets", *WHOLE, "--out", str(out / "step-whole.csv")], 120),
        Part("training", [*python, "benchmarks.llama", "--out", str(out / "training.csv")], 90),
        Part("peers", [*python, "benchmarks.peers", "--out", str(out / "peers.csv")], 60),
        Part("step-others", [*step, "--sets", *OTHERS, "--out", str(out / "step-others.csv")], 90),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        # Not those that fill the device, and no tests that capture graphs, which it does not follow.
        checked = [sanitizer, "--error-exitcode", "1", *tests, "tests/ops/triton/test_values.py"]
        found.insert(2, Part("sanitizer", checked, 120))
    return found


def run(part: Part, out: Path, left: float) -> str:
    """How a part went, in words."""
    if left <= 10:
        return "left out: the time is up"
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
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this suite needs a CUDA device, and there is none")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + BUDGET
    lines = [f"device: {torch.cuda.get_device_name()}, torch {torch.__version__}"]
    if shutil.which("compute-sanitizer") is None:
        lines.append("sanitizer: left out, compute-sanitizer is not installed")
    for part in parts(out):
        lines.append(f"{part.name}: {run(part, out, end - time.monotonic())}")
        print(lines[-1], flush=True)
        with replacing(out / "summary.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(any("failed" in line or "stopped" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
