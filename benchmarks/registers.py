"""Count the registers of the compiled kernels: ``python -m benchmarks.registers`` writes results/registers.csv.

Every kernel is compiled ahead of time as the library launches it, which needs no GPU. Of each binary are counted:
registers per thread, shared memory, local memory (for spilled registers), and loads and stores of 128 bits.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, clone
from tqdm.auto import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import save, versions
from gradguide import Alignment, Direction, Magnitude, SourceGradient
from gradguide.ops import Row, Write
from gradguide.ops import triton as ops
from gradguide.ops.triton import launch
from gradguide.ops.triton import launch_adam as fused
from gradguide.rules.decide import SOURCES, STATISTICS, Rules
from gradguide.rules.span import Span
from gradguide.rules.triton import decide as deciding
from gradguide.step.fused_adam import MAX_SETTINGS, MAX_SOURCES

RESULTS = Path(__file__).parent / "results" / "registers.csv"
ARCHITECTURES = (80, 90, 100)
KERNELS = (
    *((launch, name) for name in ("measure", "finish", "total", "combine")),
    *((fused, name) for name in ("probe", "adam", "count")),
)
DECISIONS = tuple((deciding, f"{name}_kernel") for name in ("decide", "constrain", "constrain_preview"))

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """One compiled kernel, one row of the result file.

    registers: per thread. shared: bytes per program. local: instructions that read or write local memory (spills).
    loads_128, stores_128: instructions of 128 bits.
    """

    kernel: str
    configuration: str
    arch: str
    registers: int
    shared: int
    local: int
    loads_128: int
    stores_128: int


@dataclass(frozen=True, slots=True)
class Call:
    """A recorded launch: the kernel, its arguments and its options."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        """Return the kernel's arguments by name."""
        names = self.kernel.arg_names
        return dict(zip(names, self.arguments, strict=False)) | {k: v for k, v in self.options.items() if k in names}


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record launches within the context instead of making them."""
    calls: list[Call] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: calls.append(Call(self._kernel, arguments, options))

    with ExitStack() as replaced:
        for module, name in KERNELS + DECISIONS:
            replaced.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name))))
        yield calls


def configurations() -> dict[str, list[Row | None]]:
    """Return the rows of typical steps: gradient, direction, then K sources."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16

    def some(dtype: torch.dtype) -> list[Tensor]:
        return [torch.ones(8, dtype=dtype)]

    def moving(dtype: torch.dtype, now: list[Tensor], anchor: list[Tensor]) -> Row:
        return Row(offset=some(dtype), scale=some(dtype), at=now, anchor=anchor)

    found: dict[str, list[Row | None]] = {"gradient": [Row(offset=some(f32))]}
    for name, dtype in (("fp32", f32), ("bf16", bf16), ("fp16", f16)):
        now, anchor = some(dtype), some(f32)
        own: list[Row | None] = [Row(offset=some(dtype)), Row(offset=some(f32))]
        found[f"{name}, K=0"] = own
        found[f"{name}, K=1"] = [*own, Row(offset=some(bf16))]
        found[f"{name}, K=1 moving"] = [*own, moving(bf16, now, anchor)]
        found[f"{name}, K=1 anchored"] = [*own, Row(scale=some(bf16), at=now, anchor=anchor)]
        found[f"{name}, K=4 moving"] = [*own, *(moving(bf16, now, anchor) for _ in range(4))]
        before = some(dtype)
        own = [Row(at=now, anchor=before), Row(offset=before)]
        found[f"{name}, update, K=1 moving"] = [*own, moving(bf16, before, anchor)]
    now, anchor = some(f32), some(f32)
    own = [Row(offset=some(f32)), Row(offset=some(f32))]
    found["fp32, K=16"] = [*own, *(Row(offset=some(f32)) for _ in range(16))]
    found["fp32, K=16 moving"] = [*own, *(moving(bf16, now, anchor) for _ in range(16))]
    return found


def decisions() -> dict[str, Rules]:
    """Return the default rules over K sources, and rules that act on the gradient only."""

    def rules(count: int, on: str, magnitude: Magnitude) -> Rules:
        source = SourceGradient({"p": torch.ones(1)})
        alignment = Alignment([source] * count, on=on, weight=1.0) if count else None
        return Rules(Direction(), alignment, magnitude)

    return {f"decisions, K={k}": rules(k, "update", Magnitude()) for k in (0, 1, 4, 16)} | {
        f"decisions on the gradient, K={k}": rules(k, "gradient", Magnitude(max_update=None)) for k in (1, 16)
    }


def decision_calls(rules: Rules) -> list[Call]:
    """Return the launches of a step's two decisions."""
    step, update = SOURCES + rules.source_count, SOURCES + rules.update_source_count
    spans = [Span(torch.ones(1, size, size, dtype=torch.float64)) for size in (step, update)]
    one = torch.ones(1, dtype=torch.float64)
    with recorded() as calls:
        places, totals = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)
        deciding.decide(spans[0], rules, one.new_ones(1, len(STATISTICS)), places, totals)
        deciding.constrain(spans[1], rules, one)
        deciding.constrain_preview(spans[0], one.new_ones(1, update), rules, one)
    return calls


def calls_of(rows: list[Row | None]) -> list[Call]:
    """Return the launches of a step over ``rows``: measure them, write the first two or the update, step AdamW."""
    first, *others = [row for row in rows if row is not None]
    coefficients = torch.ones(1, len(rows), dtype=torch.float64)
    if first.offset is None:
        assert first.at is not None
        writes = [Write(into=first.at, coefficients=coefficients)]
    else:
        targets = [row.offset for row in (first, *others[:1]) if row.offset is not None]
        writes = [Write(into=target, coefficients=coefficients) for target in targets]
    with recorded() as calls:
        ops.gram(rows)
        # An update is written as a combination of the parameters after and before it.
        ops.combine_(rows if first.at is None else [Row(offset=first.at), *others], writes)
        # Rows of an update exist only after the base has stepped, so there is no fused step over them.
        if first.offset is not None:
            adamw(rows, first.offset)
    return calls


def adamw(rows: list[Row | None], like: Sequence[Tensor]) -> None:
    """Launch the fused step over ``rows``: measure its update, then step without and with the rules on the update.

    The parameters are those of a moving source if there is one, else tensors that no row uses.
    """
    parameters = next((list(row.at) for row in rows if row is not None and row.at is not None), [*map(clone, like)])
    moments = fused.Moments(
        parameters=parameters, first=[*map(clone, like)], second=[*map(clone, like)], steps=[torch.zeros(())]
    )
    settings = [fused.Settings(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)]
    coefficients = torch.ones(1, len(rows), dtype=torch.float64)
    direction = rows[1] if len(rows) > 1 else None
    write = None if direction is None else Write(into=direction.tensors, coefficients=coefficients)
    columns = fused.plan_adam(rows, write, moments)
    assert columns is not None
    one = torch.ones(1, dtype=torch.float64)
    sources = max(len(rows) - SOURCES, 0)
    limited = sources <= MAX_SOURCES
    for count in (1, MAX_SETTINGS) if sources == 1 else (1,):
        groups = fused.Groups(
            settings=settings * count, which=array("q", [0]), on_device=False, decoupled=True, maximize=False
        )
        if limited:
            fused.launch_preview_update(columns, rows, coefficients, moments, groups, SOURCES, sources)
        for pulls in (None, coefficients) if limited else (None,):
            fused.launch_adam(columns, rows, coefficients, write, moments, groups, one, pulls, one.float())
    fused.launch_count(columns, moments, one.float())


def compiled(call: Call, arch: int) -> bytes:
    """Return the binary for one architecture, specialised as in a launch with these arguments."""
    names, given = call.kernel.arg_names, call.given
    constants = {p.name for p in call.kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else signature_of(given[name]) for name in names}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(call.kernel.params):
        # torch aligns memory to 16 bytes or more, which a launch passes on to the compiler.
        if isinstance(given[parameter.name], Tensor) and not parameter.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(call.kernel, signature, {name: given[name] for name in constants}, attributes)
    target = GPUTarget("cuda", arch, 32)
    options = {name: value for name, value in call.options.items() if name not in names}
    binary: bytes = triton.compile(source, target=target, options=options).asm["cubin"]
    return binary


def signature_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, tuple):
        return tuple(map(signature_of, value))
    return "fp32" if isinstance(value, float) else "i32"


def inspect(binary: bytes) -> dict[str, int]:
    """Return registers, shared memory, and local and 128-bit instructions of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = tool(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "shared": int(re.findall(r"SHARED:(\d+)", usage)[0]),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads_128": len(re.findall(r"\bLDG\.E(?:\.\w+)*?\.128\b", code)),
        "stores_128": len(re.findall(r"\bSTG\.E(?:\.\w+)*?\.128\b", code)),
    }


def tool(*command: str) -> str:
    """Run a command, and return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def binaries(architectures: list[int], names: list[str]) -> list[Binary]:
    """Compile every kernel of the configurations ``names``."""
    found: dict[tuple[str, str, str], Binary] = {}
    for name in tqdm(names, desc="compiling", leave=False):
        rows = configurations().get(name, [])
        for call in calls_of(rows) if rows else decision_calls(decisions()[name]):
            kernel = call.kernel.__name__
            label = name
            if kernel == "measure" and len(rows) > launch.TILE:
                label += f", rows {call.given['first_a']} and {call.given['first_b']} on"
            if kernel == "adam" and call.options["PULLED"]:
                label += ", pulled"
            if kernel in ("adam", "probe") and len(call.given["settings"]) > 1:
                label += f", {MAX_SETTINGS} groups"
            for arch in architectures:
                numbers = inspect(compiled(call, arch))
                found[kernel, label, f"sm_{arch}"] = Binary(
                    kernel=kernel, configuration=label, arch=f"sm_{arch}", **numbers
                )
    return list(found.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="(default: %(default)s)")
    names = [*configurations(), *decisions()]
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="configurations (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton's interpreter does not compile kernels; unset TRITON_INTERPRET")
    found = binaries(options.arch, options.only)
    about = versions()
    save(options.out, found, {key: about[key] for key in ("triton", "torch", "commit")})
    for binary in found:
        print(
            f"{binary.arch:7} {binary.kernel:8} {binary.configuration:40} {binary.registers:3} registers, "
            f"{binary.local} local, {binary.loads_128} loads and {binary.stores_128} stores of 128 bits"
        )


if __name__ == "__main__":
    main()
