"""Run ranks as separate processes."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

import gradguide

__all__ = ["answers", "join", "ranks"]

_IMPORTED = [
    "tests.distributed.launch",
    "tests.distributed.problem",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
]
"""Modules that are imported once for all ranks. Their import takes longer than the work of most ranks."""


def ranks(script: str | Path, folder: Path, world: int = 2, *arguments: str, timeout: float = 180.0) -> list[str]:
    """Run ``script RANK WORLD FOLDER ARGUMENTS...`` once per rank, and return the outputs.

    A relative path is relative to this folder. Each rank is a fork of a process that has only imported modules.

    Raises:
        AssertionError: a rank failed, or took longer than ``timeout`` seconds.
    """
    path = Path(__file__).parent / script
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    logs = [folder / "-".join(["output", path.stem, str(rank), str(world), *arguments]) for rank in range(world)]
    processes = [
        context.Process(target=_run, args=(path, [str(rank), str(world), str(folder), *arguments], log), daemon=True)
        for rank, log in enumerate(logs)
    ]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(gradguide.__file__).parents[1]))
            patch.setenv("OMP_NUM_THREADS", "1")
            for process in processes:
                process.start()
        for process, log in zip(processes, logs, strict=True):
            process.join(timeout)
            assert process.exitcode == 0, f"exit code {process.exitcode}: {log.read_text()}"
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
            process.close()
    return [log.read_text() for log in logs]


def _run(path: Path, arguments: list[str], log: Path) -> None:
    """Run a script as the main module in this process, with its output in the file ``log``."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


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
