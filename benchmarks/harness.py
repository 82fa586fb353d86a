"""Time cases side by side in one run, and write results with the versions that they were measured with."""

from __future__ import annotations

import csv
import gc
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import gradguide
from gradguide.utils.atomic import atomic_write

__all__ = [
    "BASELINE",
    "Case",
    "Result",
    "append_row",
    "compared",
    "digest_of",
    "held_bytes",
    "ratios",
    "read_rows",
    "save",
    "summarise",
    "synchronise",
    "time_side_by_side",
    "versions",
]

BASELINE = "clip_grad_norm_ + AdamW(fused)"
"""The baseline of a guided step."""
_BLOCK = 2**24  # bytes read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to time: ``prepare`` runs before each timed call of ``run``, untimed."""

    name: str
    prepare: Callable[[], None]
    run: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row of a result file: median, 20th and 80th percentile over ``rounds``."""

    benchmark: str
    provider: str
    metric: str
    unit: str
    value: float
    low: float
    high: float
    rounds: int


def time_side_by_side(cases: Iterable[Case], *, rounds: int, warmup: int, label: str) -> dict[str, list[float]]:
    """Return the milliseconds of each case. In every round each case runs once, in rotating order.

    Returns:
        The time of each case in every round, so that ratios can be taken within rounds.
    """
    cases = list(cases)
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    gc.disable()
    try:
        for index in tqdm(range(warmup + rounds), desc=label, leave=False):
            shift = index % len(cases)
            for case in cases[shift:] + cases[:shift]:
                case.prepare()
                synchronise()
                start = time.perf_counter()
                case.run()
                synchronise()
                if index >= warmup:
                    times[case.name].append(1e3 * (time.perf_counter() - start))
    finally:
        gc.enable()
    return times


def summarise(benchmark: str, provider: str, metric: str, unit: str, values: list[float]) -> Result:
    """Return median, 20th and 80th percentile of ``values``."""
    cuts = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return Result(
        benchmark=benchmark,
        provider=provider,
        metric=metric,
        unit=unit,
        value=statistics.median(values),
        low=cuts[0],
        high=cuts[3],
        rounds=len(values),
    )


def ratios(times: Mapping[str, list[float]], name: str, against: str) -> list[float]:
    """Return the time of ``name`` divided by that of ``against`` in the same round."""
    return [mine / base for mine, base in zip(times[name], times[against], strict=True)]


def compared(benchmark: str, times: Mapping[str, list[float]], against: str, metric: str = "time") -> list[Result]:
    """Return the milliseconds of each case, and their ratio to ``against``."""
    results = []
    for name, mine in times.items():
        results.append(summarise(benchmark, name, metric, "ms", mine))
        results.append(summarise(benchmark, name, f"{metric} / {against}", "ratio", ratios(times, name, against)))
    return results


def held_bytes() -> int:
    """Return the bytes of all living tensors; shared storage counts once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        # Exact types only: subclasses such as fake tensors have no storage.
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def versions() -> dict[str, str]:
    """Return what results depend on: commit, versions, device, threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "commit": _commit(),
        "gradguide": gradguide.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "triton": _triton(),
    }


def save(path: Path, results: Sequence[Any], about: Mapping[str, str]) -> None:
    """Write ``results``, at least one instance of a dataclass, as CSV; every row ends with the columns of ``about``."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(results[0])] + list(about), lineterminator="\n")
        writer.writeheader()
        for result in results:
            row = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in asdict(result).items()}
            writer.writerow({**row, **about})


def digest_of(model: str, paths: Iterable[Path], about: str = "") -> str:
    """Return a digest of a model (a folder or a hub id), of files and folders, and of ``about``.

    Of files it is that of names and content: two fine-tuned models have files of equal names and sizes.
    """
    folder = Path(model)
    found = hashlib.blake2b(f"{'' if folder.is_dir() else model} {about}".encode(), digest_size=5)
    for path in (folder, *paths):
        for part in sorted(path.iterdir()) if path.is_dir() else [path]:
            if not part.is_file():
                continue
            found.update(f"{part.name} {part.stat().st_size}".encode())
            with part.open("rb") as file:
                while block := file.read(_BLOCK):
                    found.update(block)
    return found.hexdigest()


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a CSV file, and first the header if the file is new. Missing values are empty.

    One call writes the whole row, so that an interruption leaves no partial row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file; an empty list if there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(columns):
            raise ValueError(f"{path} has other columns than this version writes: move it away, or name another --out")
        return list(reader)


def synchronise() -> None:
    """Wait until the device has done all that was launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} x{os.cpu_count()}"


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "../gradguide"],
            cwd=folder, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")
