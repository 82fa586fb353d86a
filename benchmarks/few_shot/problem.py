"""A few-shot problem: what is trained, on which loss, and how it is evaluated. Any kind of model can provide one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from gradguide import SourceGradient

__all__ = ["HEAD_LR", "Problem"]

HEAD_LR = 1e-2
"""Learning rate of a new head, for every method. The rate under study is that of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """
    Args:
        adapter: (name, parameter) of what was trained on the source and is trained further on the target.
        head: parameters of the new head.
        head_lr: learning rate of the head; None for that of the adapter.
        rows: number of training rows; row numbers are in [0, rows).
        classes: number of target classes.
        loss: mean loss of the given training rows, a scalar.
        source_loss: one function per earlier task, for methods that use source data at every step. Each call returns
            the mean loss of that task's next batch, a scalar.
        sources: one stored source gradient per earlier task.
        pool_loss: yields (number of examples, mean loss) for batches of a sample of the whole target training set.
        accuracy: accuracies by name, in [0, 1]; one name is "target".
        probe: accuracy on a small test sample, in [0, 1]; cheap enough to call during training.
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
        """Return param groups: the adapter at ``lr``, and the head, if there is one, at its own rate."""
        adapter, head = [p for _, p in self.adapter], list(self.head)
        if self.head_lr is None or not head:
            return [{"params": [*adapter, *head], "lr": lr}]
        return [{"params": adapter, "lr": lr}, {"params": head, "lr": self.head_lr}]
