"""Compute the source gradient from live batches of the source task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from gradguide.distributed.layouts import Layout, is_distributed, layout_of, local, reduce_partial
from gradguide.ops.allocate import allocate_contiguous
from gradguide.ops.row import Row
from gradguide.ops.tensors import all_finite
from gradguide.sources.protocol import row_or_zeros
from gradguide.sources.side_effects import RandomState, check_hooks, leaves, preserve_buffers, preserve_gradients
from gradguide.utils.checks import check_steps

__all__ = ["ReplaySource"]

_GROWTH = 2.0 ** (1 / 2000)
"""Growth of the largest scale with each finite gradient: it doubles in as many as GradScaler's."""

_Kind: TypeAlias = tuple[torch.Size, torch.device, tuple[Any, ...]]


class ReplaySource:
    """The gradient of a source batch at the current parameters, as in A-GEM (arXiv 1812.00420).

    It costs one additional forward and backward pass every ``every`` steps, and two rows of memory. Other steps reuse
    the last finite gradient. A step evaluates anew if there is none yet, or if names, shapes or devices of
    parameters changed. Pass it to :class:`gradguide.Alignment`, alone or together with stored sources.

    The passes leave gradients (including those that another optimizer uses), buffers (batch statistics) and torch's
    random state unchanged. Buffers of a compiled model are kept only if GradGuide has ``names=model``, since compiled
    code calls no hooks. Drawing batches is no part of a pass: a DataLoader without its own ``generator`` takes numbers
    from torch's random state each time it is iterated.

    A checkpoint holds neither the position in ``batches`` nor the steps to the next evaluation nor the last gradient.
    A resumed run evaluates the first batch at its first step, so it differs from a run that was not stopped. To make
    them equal, save at a multiple of ``every``, and resume with ``batches`` that continue where they stopped, such as a
    stateful data loader.

    Under ``torch.distributed``, every rank supplies its own batches. The gradient is the mean over the ranks of the
    model's DistributedDataParallel or device mesh, or else over all ranks, whether the loss uses the wrapped model or
    not.

    Args:
        batches: source batches. It is iterated repeatedly, so it must be a list, a DataLoader or the like.
        loss: ``loss(batch)``, the mean over the batch's examples, a scalar with its graph. It closes over the model.
            If training uses autocast, the loss must enter autocast itself.
        every (int): steps from one evaluation to the next, at least 1.
        scaler: the GradScaler of float16 training. The loss is multiplied by its scale and the gradient divided by it.
            If the gradient overflows, a lower scale is used for further batches, and the last finite gradient is
            reused. If there is none, the batch is evaluated again.

    Raises:
        ValueError, TypeError: ``every`` is out of range, or ``batches`` is not iterable.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
        every: int = 1,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        check_steps("every", every)
        if every < 1:
            raise ValueError(f"every must be at least 1, found {every}")
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches must be iterable, found {type(batches).__name__}")
        self.groups: tuple[Any, ...] = (None,)
        """Process groups that connect the ranks of the model; None is the default group. GradGuide sets it."""
        self._batches = batches
        self._loss = loss
        self._every = every
        self._scaler = scaler
        self._most = math.inf  # upper bound of the scale, lowered when a gradient overflows
        self._stream: Iterator[Any] | None = None
        self._rows: dict[str, Tensor] = {}
        self._kinds: dict[str, _Kind] = {}
        self._finite = False  # the rows; after that, rows that are not finite are replaced by the last ones
        self._steps = 0

    @property
    def weight(self) -> float:
        """Default weight: 0 (projection only)."""
        return 0.0

    def shapes(self) -> None:
        """Return None: the source covers every parameter."""
        return

    def fingerprint(self) -> str:
        """Return a digest of the options alone: batches differ between ranks, and gradients are averaged."""
        return f"replay every {self._every}"

    def shards(self, layouts: Mapping[str, Layout]) -> ReplaySource:
        """Return the source itself: gradients of sharded parameters are local parts already."""
        return self

    def due(self, parameters: Mapping[str, Tensor]) -> bool:
        """Return whether ``refresh`` will evaluate a batch."""
        due = self._steps % self._every == 0 or not self._finite or self._kinds != _kinds(parameters)
        return due and bool(parameters)

    def refresh(self, parameters: Mapping[str, Tensor], trained: Sequence[Tensor]) -> None:
        """Evaluate the next batch if an evaluation is due.

        Raises:
            ValueError: there is no batch left, or its loss is not a scalar with a graph, or reaches none of the
                parameters. Gradients are unchanged.
            RuntimeError: a parameter has a hook that runs in backward after its gradient is accumulated.
        """
        if self.due(parameters):
            batch = self._next()
            while self._overflows(batch, parameters, trained) and not self._finite:
                pass  # at a lower scale each time
        self._steps += 1

    def row(self, names: Sequence[str], at: Sequence[Tensor]) -> Row:
        """Return the last gradient; zero for parameters that the loss did not reach, such as frozen ones."""
        return row_or_zeros(self._rows, names, at)

    def __getstate__(self) -> dict[str, Any]:
        # Neither an iterator nor a group can be copied or pickled. A copy starts at the first batch.
        return {**self.__dict__, "_stream": None, "groups": (None,)}

    def __repr__(self) -> str:
        return f"ReplaySource(every={self._every})"

    def _overflows(self, batch: Any, parameters: Mapping[str, Tensor], trained: Sequence[Tensor]) -> bool:
        """Evaluate a batch. Return whether its gradient is not finite and a lower scale may help."""
        if self._scaler is None:
            self._evaluate(batch, parameters, trained, 1.0)
            return False
        scale = min(float(self._scaler.get_scale()), self._most)
        if bool(self._evaluate(batch, parameters, trained, scale)):
            self._most *= _GROWTH
            return False
        self._most = max(scale / 2, 1.0)
        return scale > 1.0

    def _evaluate(
        self, batch: Any, parameters: Mapping[str, Tensor], trained: Sequence[Tensor], scale: float
    ) -> Tensor:
        """Store the gradient of a batch. Return whether it is finite on all ranks: Tensor []."""
        state = RandomState(trained)
        own = set(trained)
        try:
            with preserve_gradients(trained), preserve_buffers(), torch.enable_grad():
                loss = self._loss(batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise ValueError(
                        f"the loss of a replayed batch must be a scalar with its graph, found {loss!r:.80}"
                    )
                names = {p: name for name, p in parameters.items()}
                others = [leaf for leaf in leaves(loss) if leaf not in own]
                check_hooks([*trained, *others], names)
                with preserve_gradients(others):
                    (loss * scale).backward()
                found = {name: p.grad for name, p in parameters.items()}
                if all(gradient is None for gradient in found.values()):
                    raise ValueError("the loss of a replayed batch reaches none of the guided parameters")
                return self._store(parameters, found, 1.0 / scale)
        finally:
            state.restore()

    @torch.no_grad()
    def _store(self, parameters: Mapping[str, Tensor], found: Mapping[str, Tensor | None], factor: float) -> Tensor:
        values = [local(p) for p in parameters.values()]
        new = allocate_contiguous(values)
        torch._foreach_copy_(
            new,
            [
                torch.zeros_like(n) if g is None else local(reduce_partial(g, p))
                for n, g, p in zip(new, found.values(), parameters.values(), strict=True)
            ],
        )
        torch._foreach_mul_(new, factor)
        if is_distributed():
            plain = [n for n, p in zip(new, parameters.values(), strict=True) if layout_of(p) is None]
            _average(plain, self.groups)
        rows = dict(zip(parameters, new, strict=True))
        finite = all_finite(new)
        if is_distributed():  # shards differ between ranks, and all ranks must evaluate at the same steps
            finite = _on_all_ranks(finite, self.groups)
        kinds = _kinds(parameters)
        if self._finite and self._kinds == kinds:
            for name, tensor in rows.items():
                tensor.copy_(torch.where(finite.to(tensor.device), tensor, self._rows[name]))
        else:
            self._finite = bool(finite)  # without a scaler, the only read on the host
        self._rows, self._kinds = rows, kinds
        return finite

    def _next(self) -> Any:
        for _ in range(2):
            if self._stream is None:
                self._stream = iter(self._batches)
            for batch in self._stream:
                return batch
            self._stream = None
        raise ValueError(
            "batches must hold at least one batch each time, found none; a generator can be read only once"
        )


def _kinds(parameters: Mapping[str, Tensor]) -> dict[str, _Kind]:
    """Return what determines the shape and device of each parameter's row. Shapes are those of whole tensors.

    So it changes on all ranks or on none, and all evaluate at the same steps.
    """
    return {
        name: (p.shape, p.device, () if (layout := layout_of(p)) is None else layout.placements)
        for name, p in parameters.items()
    }


def _on_all_ranks(flag: Tensor, groups: Sequence[Any]) -> Tensor:
    """Return whether a flag is true on all ranks of some groups."""
    number = flag.int()
    for group in groups:
        dist.all_reduce(number, op=dist.ReduceOp.MIN, group=group)
    return number.bool()


def _average(tensors: list[Tensor], groups: Sequence[Any]) -> None:
    """Replace the tensors by their mean over the ranks, in one collective per group. Equal tensors stay the same."""
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    for group in groups:
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
