"""A small training run on the device, guided in several ways."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient, StructuredSource

__all__ = ["KINDS", "WITHOUT_WAITING", "Training", "no_waiting", "train"]

KINDS = (
    "defaults", "direction", "fused", "shared momentum", "moving source", "on update", "not fused", "by module",
    "structured",
)  # fmt: skip
WITHOUT_WAITING = tuple(kind for kind in KINDS if kind != "not fused")
"""Of a base that is not fused the host reads one flag per step."""


class Training:
    """A model, its optimizer, and batches that are the same at every call with one step."""

    def __init__(self, kind: str, backend: str = "triton", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        # Odd sizes: parts of blocks, and addresses that are not all aligned.
        self.model = nn.Sequential(nn.Linear(67, 513), nn.Tanh(), nn.Linear(513, 129), nn.Tanh(), nn.Linear(129, 5))
        self.model.to("cuda", dtype)
        named = list(self.model.named_parameters())
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=kind != "not fused", capturable=True)
        options: dict[str, Any] = {"names": named, "backend": backend}
        if kind not in ("defaults", "structured"):
            options["direction"] = Direction()
        if kind == "shared momentum":
            options["direction"] = Direction(share_momentum=True)
        if kind in ("moving source", "on update"):
            on = "update" if kind == "on update" else "gradient"
            options["alignment"] = Alignment(self._source(named), on=on, weight=0.5)
            options["magnitude"] = Magnitude(max_norm=math.inf)
        if kind == "fused":
            options["magnitude"] = Magnitude(max_update=None)
        if kind == "structured":
            batches = torch.randn(4, 16, 67, generator=torch.Generator().manual_seed(8)).to("cuda", dtype)
            source = StructuredSource.capture(
                self.model, batches, lambda model, x: model(x).float().square().mean(), rank=8
            )
            options |= {"alignment": Alignment(source), "names": self.model}
        if kind == "by module":
            options["scope"] = "module"
        self.optimizer = GradGuide(base, **options)
        self.x = torch.empty(16, 67, device="cuda", dtype=dtype)
        self.y = torch.empty(16, dtype=torch.long, device="cuda")

    def fill(self, step: int) -> None:
        """Put a step's batch in place."""
        generator = torch.Generator().manual_seed(100 + step)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.y.copy_(torch.randint(5, self.y.shape, generator=generator))

    def step(self) -> Tensor:
        """One training step on the batch that is in place."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.x).float(), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    @staticmethod
    def _source(named: list[tuple[str, nn.Parameter]]) -> SourceGradient:
        generator = torch.Generator().manual_seed(7)

        def draw(scale: float) -> dict[str, Tensor]:
            return {n: (torch.randn(p.shape, generator=generator) * scale).to(p.device) for n, p in named}

        anchor = {n: p.detach().float().clone() for n, p in named}
        return SourceGradient(draw(1e-2), fisher={n: t.abs() for n, t in draw(1.0).items()}, anchor=anchor)


def train(training: Training, steps: int) -> Training:
    for step in range(steps):
        training.fill(step)
        training.step()
    return training


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the device is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
