"""A few-shot problem: what is trained, on which loss, and how it is judged; a model of any kind can stand behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from gradguide import SourceGradient

__all__ = ["HEAD_LR", "Problem"]

HEAD_LR = 1e-2
"""Rate of a new head, for every method: it starts from nothing, and the rate under study is that of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """
    Args:
        adapter: what the source knows and the target trains further, (name, parameter).
        head: the new head's parameters.
        head_lr: the head's rate; None for that of the adapter.
        rows: number of training rows; row numbers are in [0, rows).
        classes: number of target classes.
        loss: mean loss of the given training rows, a scalar.
        source_loss: one per earlier task: mean loss of that task's next batch, a scalar. For methods with live sources.
        sources: one stored source gradient per earlier task.
        pool_loss: (examples, mean loss) of batches of a sample of the target's whole training pool, lazily.
        accuracy: accuracies by name, in [0, 1]; "target" is one of them.
        probe: accuracy on a small test sample, in [0, 1]; cheap enough to ask along the way.
    """

    adapter: Sequence[tuple[str, nn.Parameter]]
    head: Sequence[nn.Parameter]
    head_lr: float | None = HEAD_LR
    rows: int
    classes: int
    loss: Callable[[Sequence[int]], Tensor]
    source_loss: Sequence[Callable[[], Tensor]]
    sources: Sequence[SourceGradient]
    pool_loss: Callable[[], Iterable[tuple[int, Tensor]]]
    accuracy: Callable[[], dict[str, float]]
    probe: Callable[[], float]
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", [*(p for _, p in self.adapter), *self.head])

    def groups(self, lr: float) -> list[dict[str, object]]:
        """Param groups: the adapter at ``lr``, the head, if there is one, at its own rate."""
        adapter, head = [p for _, p in self.adapter], list(self.head)
        if self.head_lr is None or not head:
            return [{"params": [*adapter, *head], "lr": lr}]
        return [{"params": adapter, "lr": lr}, {"params": head, "lr": self.head_lr}]
