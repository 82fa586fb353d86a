"""Run ranks as separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import gradguide

__all__ = ["answers", "join", "ranks"]


def ranks(script: str | Path, folder: Path, world: int = 2, *arguments: str, timeout: float = 180.0) -> list[str]:
    """Run ``script RANK WORLD FOLDER ARGUMENTS...`` once per rank, and return the outputs.

    A relative path is relative to this folder.

    Raises:
        AssertionError: a rank failed, or took longer than ``timeout`` seconds.
    """
    root = Path(gradguide.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    # One process per rank, by path: a spawned child cannot import pytest's test modules.
    path = Path(__file__).parent / script
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(world), str(folder), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, output
            outputs.append(output)
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # reap the process and close its pipe in any case
    return outputs


def answers(script: str, folder: Path, world: int = 2) -> list[dict[str, Any]]:
    """Run the script on ``world`` ranks, and return what each saved as ``folder/rankR.pt``."""
    ranks(script, folder, world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def join(work: Callable[..., None]) -> NoReturn:
    """Run ``work(rank, world, folder, arguments...)`` with the command-line arguments, in a gloo group."""
    rank, world, folder, *arguments = sys.argv[1:]
    meeting = Path(folder) / "-".join(["meeting", world, *arguments])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=int(rank),
        world_size=int(world),
        timeout=timedelta(seconds=60),  # if another rank has exited
    )
    work(int(rank), int(world), Path(folder), *arguments)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a gloo thread that outlives its group would abort the process at interpreter shutdown
