"""Count what GradGuide sends: ``python -m benchmarks.communication`` writes results/communication.csv.

Two gloo ranks train models of 1e5 and 1e7 parameters under FSDP2. Measured are the number and the bytes of GradGuide's
all-reduces, and the time of a step with and without GradGuide. For more ranks, bytes are computed: in a ring
all-reduce of n ranks, each rank moves 2 (n - 1) / n times the payload.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW, Optimizer

from benchmarks.harness import versions
from gradguide import Alignment, GradGuide, SourceGradient
from gradguide.utils.atomic import atomic_write

RESULTS = Path(__file__).parent / "results" / "communication.csv"
SIZES = {"1e5": 224, "1e7": 2236}  # width of two square layers
RANKS = (2, 8, 64, 1024)
STEPS = 12


def model_of(width: int) -> nn.Module:
    """Return a model of two square layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def optimizer_of(model: nn.Module, kind: str) -> Optimizer:
    """Return AdamW, or GradGuide around it with the source that ``kind`` names."""
    base = AdamW(model.parameters(), lr=1e-4)
    if kind == "AdamW":
        return base
    if kind == "no source":
        return GradGuide(base)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    table = {name: torch.rand(shape) for name, shape in shapes.items()}
    source = SourceGradient(table) if kind == "one source" else SourceGradient(None, fisher=table, anchor=dict(table))
    return GradGuide(base, alignment=Alignment(source), names=model.named_parameters())


def measure(rank: int, world: int, rendezvous: str) -> list[dict[str, Any]]:
    """Return payloads and seconds per step by size and optimizer; runs on every rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    rows = []
    for label, width in SIZES.items():
        for kind in ("AdamW", "no source", "one source", "anchored source"):
            torch.manual_seed(1)  # the source is the same on all ranks
            model = model_of(width)
            fully_shard(model, mesh=mesh)
            counted, seconds = steps(model, optimizer_of(model, kind), width)
            rows.append({"parameters": label, "optimizer": kind, "payloads": counted, "seconds": seconds})
    dist.destroy_process_group()
    return rows


def steps(model: nn.Module, optimizer: Optimizer, width: int) -> tuple[list[int], float]:
    """Return the bytes of each all-reduce of the last step, and the median seconds of all steps but the first two."""
    module: Any = dist
    original, payloads, seconds = dist.all_reduce, [], []

    def counting(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        payloads.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **options)

    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(2, width)).square().mean().backward()
        payloads.clear()
        dist.barrier()
        module.all_reduce = counting
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        module.all_reduce = original
    return list(payloads), statistics.median(seconds[2:])


def launch() -> list[dict[str, Any]]:
    """Run ``measure`` on two ranks, and return what the first one found.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks.communication",
            "--rendezvous",
            str(Path(folder) / "rendezvous"),
            "--rank",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a rank failed; its error is above")
    found: list[dict[str, Any]] = json.loads(outputs[0].splitlines()[-1])
    return found


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the result file: measured on two ranks, computed for more."""
    rows = []
    alone = {row["parameters"]: row["seconds"] for row in found if row["optimizer"] == "AdamW"}
    for row in found:
        for ranks in RANKS:
            payload = sum(row["payloads"])
            rows.append({
                "parameters": row["parameters"],
                "optimizer": row["optimizer"],
                "ranks": ranks,
                "how": "measured" if ranks == 2 else "computed",
                "all_reduces_per_step": len(row["payloads"]),
                "payload_bytes": payload,
                "bytes_moved_per_rank": round(2 * (ranks - 1) / ranks * payload, 1),
                "added_milliseconds": f"{1e3 * (row['seconds'] - alone[row['parameters']]):.3g}" if ranks == 2 else "",
            })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rank is not None:
        print(json.dumps(measure(options.rank, 2, options.rendezvous)), flush=True)
        os._exit(0)  # a gloo thread that outlives its group can abort the process at exit
    rows, about = table(launch()), versions()
    with atomic_write(options.out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
