"""Measure the stability of a run's gradients, and the alignment of its updates with the gradient of many rows.

Everything stays on the device until the run is over, so that no step waits for it. It takes time all the same: runs
that measure it are not for timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.language.model import grads

__all__ = ["Stability"]

_DECAY = 0.95


class Stability:
    """Stability of the gradients before any change, as in ``few_shot``, and alignment of two updates of the run.

    Args:
        parameters: the adapter's.
        pool: sets the gradient of the mean loss of many training rows; called once per batch of them.
        aligned: numbers of the steps, from 1, whose updates are compared with the pool's gradient.
    """

    def __init__(
        self, parameters: Sequence[Tensor], pool: Sequence[Callable[[], None]], aligned: Sequence[int]
    ) -> None:
        self._parameters = parameters
        self._pool = pool
        self._aligned = set(aligned)
        self._mean: Tensor | None = None
        self._last: Tensor | None = None
        self._coherences: list[Tensor] = []
        self._cosines: list[Tensor] = []
        self._alignments: list[Tensor] = []
        self._before: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Compute the pool's gradient, if the update of this step is compared. It replaces the present gradients."""
        self._before = None
        if step in self._aligned and self._pool:
            total = torch.zeros_like(self._flat(self._parameters))
            for part in self._pool:
                with torch.enable_grad():
                    part()
                total += self._flat(grads(self._parameters))
            self._before = total, self._flat(self._parameters)

    @torch.no_grad()
    def observe(self) -> None:
        """Add the gradient of a step, before any change."""
        gradient = self._flat(grads(self._parameters))
        unit = gradient / gradient.norm().clamp_min(1e-30)
        if self._last is not None:
            self._cosines.append(torch.dot(unit, self._last))
        self._last = unit
        self._mean = unit * (1 - _DECAY) if self._mean is None else self._mean.lerp(unit, 1 - _DECAY)
        self._coherences.append(self._mean.norm() / (1 - _DECAY ** (len(self._coherences) + 1)))

    @torch.no_grad()
    def after(self) -> None:
        """Compare the update that was just made with the pool's gradient, if :meth:`before` computed it."""
        if self._before is not None:
            gradient, start = self._before
            change = self._flat(self._parameters) - start
            self._alignments.append(torch.nn.functional.cosine_similarity(-gradient, change, dim=0))

    def columns(self) -> dict[str, float | None]:
        """Return means over the steps: coherence, successive cosine, and alignment."""
        parts = {"coherence": self._coherences, "successive_cosine": self._cosines, "alignment": self._alignments}
        return {name: float(torch.stack(found).mean()) if found else None for name, found in parts.items()}

    @staticmethod
    def _flat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.detach().flatten() for part in parts])
