"""Check the binaries of the kernels, compiled ahead of time for three architectures without a GPU."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.registers import ARCHITECTURES, RESULTS, configurations, decisions
from gradguide.ops.triton.launch import BLOCK, WARPS, WIDE_BLOCK
from gradguide.step.fused_adam import MAX_SETTINGS

NAMES = ("fp32, K=1 moving", "bf16, K=1")

# Bytes of an element of each column that a kernel loads or stores in its aligned path.
FP32, BF16 = 4, 2
OPERANDS = (FP32, FP32, BF16, BF16, FP32, FP32)  # gradient, direction, offset, scale, parameter, anchor
MOMENTS = (FP32, FP32)
LOADED = {
    ("measure", "fp32, K=1 moving"): OPERANDS,
    ("combine", "fp32, K=1 moving"): OPERANDS,
    ("adam", "fp32, K=1 moving"): (*OPERANDS, *MOMENTS),
    ("probe", "fp32, K=1 moving"): (*OPERANDS, *MOMENTS),
    ("measure", "bf16, K=1"): (BF16, FP32, BF16),
    ("combine", "bf16, K=1"): (BF16, FP32, BF16),
    ("adam", "bf16, K=1"): (BF16, FP32, BF16, BF16, BF16, BF16),
    ("probe", "bf16, K=1"): (BF16, FP32, BF16, BF16, BF16, BF16),
}
STORED = {
    ("combine", "fp32, K=1 moving"): (FP32, FP32),
    ("adam", "fp32, K=1 moving"): (FP32, FP32, FP32, FP32),
    ("combine", "bf16, K=1"): (BF16, FP32),
    ("adam", "bf16, K=1"): (FP32, BF16, BF16, BF16),
}


def instructions(kernel: str, columns: tuple[int, ...]) -> int:
    """Return how many instructions of 16 bytes a thread needs for its elements of ``columns``."""
    block = BLOCK if kernel in ("measure", "combine") else WIDE_BLOCK
    elements = block // (32 * WARPS)
    return sum(elements * size // 16 for size in columns)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def compiled(path: Path, names: Iterable[str], architectures: Iterable[int]) -> list[dict[str, str]]:
    """Compile in a subprocess, since this process may use the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.registers", "--out", str(path), "--only", *names]
    command += ["--arch", *map(str, architectures)]
    done = subprocess.run(command, env=environment, cwd=RESULTS.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return rows_of(path)


def check(found: list[dict[str, str]]) -> None:
    """Assert that nothing is spilled, and that aligned paths load and store 128 bits at a time."""
    for row in found:
        key = row["kernel"], row["configuration"]
        assert row["local"] == "0", row
        assert int(row["loads_128"]) >= instructions(row["kernel"], LOADED.get(key, ())), row
        assert int(row["stores_128"]) >= instructions(row["kernel"], STORED.get(key, ())), row


CASES = [
    pytest.param(name, arch, marks=() if (name, arch) == (NAMES[0], 90) else pytest.mark.slow)
    for name in NAMES
    for arch in ARCHITECTURES
]


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_binaries_spill_nothing_and_load_128_bits_at_a_time(tmp_path: Path, name: str, arch: int) -> None:
    found = compiled(tmp_path / "registers.csv", [name], [arch])
    kernels = {row["kernel"] for row in found if row["configuration"] == name}
    assert kernels >= {kernel for kernel, configuration in LOADED if configuration == name}
    assert {row["arch"] for row in found} == {f"sm_{arch}"}
    check(found)


@pytest.mark.slow
def test_every_binary_spills_nothing(tmp_path: Path) -> None:
    found = compiled(tmp_path / "registers.csv", [*configurations(), *decisions()], ARCHITECTURES)
    assert [row for row in found if row["local"] != "0"] == []


def test_the_committed_results_spill_nothing_and_load_128_bits_at_a_time() -> None:
    found = rows_of(RESULTS)
    variants = rf", rows.*|(, pulled)?(, {MAX_SETTINGS} groups)?$"
    names = {re.sub(variants, "", row["configuration"]) for row in found}
    assert names == {*configurations(), *decisions()}
    assert {row["arch"] for row in found} == {f"sm_{arch}" for arch in ARCHITECTURES}
    check(found)
    assert all(int(row["registers"]) < 255 for row in found)
