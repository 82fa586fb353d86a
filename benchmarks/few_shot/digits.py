"""Problems on scikit-learn's handwritten digits: a small network with all layers trained.

The source has the digits 0 to 4, the target 5 to 9. The shared layers take the place of the adapter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.few_shot.data import Problem
from gradguide import SourceGradient, StructuredSource
from gradguide.demo.data import batches

__all__ = ["Digits"]

_SOURCE_CLASSES = 5
_WIDTH = 64
_SOURCE_STEPS = 400
_SHARE_OF_TEST = 0.4
_BATCH = 8


class Digits:
    """A network trained on the source, its source gradient, and target problems that start from it."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self._images = torch.tensor(images, dtype=torch.float32) / 16
        self._labels = torch.tensor(labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        cut = int(_SHARE_OF_TEST * len(labels))
        self._test, self._train = order[:cut], order[cut:]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._trunk = nn.Sequential(nn.Linear(64, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU())
            self._head = nn.Linear(_WIDTH, _SOURCE_CLASSES)
        self._source_rows = self._train[self._labels[self._train] < _SOURCE_CLASSES]
        self._train_source()
        self._head.requires_grad_(False)
        self._start = [p.detach().clone() for p in self._trunk.parameters()]
        self._source = self._capture()
        self.source_accuracy = self._accuracy_on_source()

    def problem(self, shots: int, seed: int) -> Problem:
        """Return a problem of ``shots`` images of each digit from 5 to 9, drawn from the seed."""
        self._set(self._start)
        for parameter in self._trunk.parameters():
            parameter.grad = None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = nn.Linear(_WIDTH, 10 - _SOURCE_CLASSES)
        generator = random.Random(seed)
        pool = [int(i) for i in self._train if self._labels[i] >= _SOURCE_CLASSES]
        rows = [
            row
            for digit in range(_SOURCE_CLASSES, 10)
            for row in generator.sample([i for i in pool if self._labels[i] == digit], shots)
        ]
        rest = torch.tensor(sorted(set(pool) - set(rows)))
        test = self._test[self._labels[self._test] >= _SOURCE_CLASSES]
        live: Iterator[list[int]] = batches(len(self._source_rows), _BATCH, seed)

        def logits(images: Tensor) -> Tensor:
            found: Tensor = head(self._trunk(images))
            return found

        def loss(chosen: Tensor) -> Tensor:
            return cross_entropy(logits(self._images[chosen]), self._labels[chosen] - _SOURCE_CLASSES)

        def accuracy(chosen: Tensor) -> float:
            with torch.no_grad():
                found = logits(self._images[chosen]).argmax(dim=1)
            return float((found == self._labels[chosen] - _SOURCE_CLASSES).float().mean())

        def pool_loss() -> Iterable[tuple[int, Tensor]]:
            yield len(rest), loss(rest)

        def few_shot_loss(numbers: Sequence[int]) -> Tensor:
            return loss(torch.tensor([rows[number] for number in numbers]))

        return Problem(
            adapter=list(self._trunk.named_parameters()),
            head=list(head.parameters()),
            rows=len(rows),
            classes=10 - _SOURCE_CLASSES,
            loss=few_shot_loss,
            source_loss=[lambda: self._source_loss(self._source_rows[next(live)])],
            sources=(self._source,),
            pool_loss=pool_loss,
            accuracy=lambda: {"target": accuracy(test), "source": self._accuracy_on_source()},
            probe=lambda: accuracy(test),
            structured=lambda: (self._structured, self._trunk),
        )

    def _source_loss(self, rows: Tensor) -> Tensor:
        return cross_entropy(self._head(self._trunk(self._images[rows])), self._labels[rows])

    def _train_source(self) -> None:
        parameters = [*self._trunk.parameters(), *self._head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        stream = batches(len(self._source_rows), 32, 0)
        for _ in range(_SOURCE_STEPS):
            optimizer.zero_grad()
            self._source_loss(self._source_rows[next(stream)]).backward()
            optimizer.step()

    def _sampled_loss(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Return the loss under labels drawn from the network."""
        generator = torch.Generator().manual_seed(0)

        def sampled(trunk: nn.Module, batch: Tensor) -> Tensor:
            found = self._head(trunk(self._images[batch]))
            drawn = torch.multinomial(found.detach().softmax(dim=1), 1, generator=generator).squeeze(1)
            return cross_entropy(found, drawn)

        return sampled

    @cached_property
    def _structured(self) -> StructuredSource:
        """The structured source. It is captured on first use, from the trained network."""
        now = [p.detach().clone() for p in self._trunk.parameters()]
        self._set(self._start)
        batches = list(self._source_rows.split(_BATCH))
        source = StructuredSource.capture(self._trunk, batches, self._sampled_loss(), rank=None)
        self._set(now)
        return source

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        torch._foreach_copy_(list(self._trunk.parameters()), list(values))

    def _capture(self) -> SourceGradient:
        return SourceGradient.capture(
            self._trunk,
            list(self._source_rows.split(_BATCH)),
            lambda _, batch: self._source_loss(batch),
            curvature=self._sampled_loss(),
        )

    @torch.no_grad()
    def _accuracy_on_source(self) -> float:
        test = self._test[self._labels[self._test] < _SOURCE_CLASSES]
        found = self._head(self._trunk(self._images[test])).argmax(dim=1)
        return float((found == self._labels[test]).float().mean())
