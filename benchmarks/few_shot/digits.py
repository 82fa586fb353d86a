"""A target that is not language: scikit-learn's handwritten digits, and a small network that is trained as a whole.

The source are the digits 0 to 4, the target 5 to 9. The network's shared layers stand for the adapter.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.few_shot.problem import Problem
from gradguide import SourceGradient
from gradguide.demo.data import batches

__all__ = ["Digits"]

_KNOWN = 5
_WIDTH = 64
_SOURCE_STEPS = 400
_SHARE_OF_TEST = 0.4
_BATCH = 8


class Digits:
    """The network after source training, its source gradient, and target problems from it."""

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
            self._head = nn.Linear(_WIDTH, _KNOWN)
        self._known = self._train[self._labels[self._train] < _KNOWN]
        self._learn()
        self._head.requires_grad_(False)
        self._start = [p.detach().clone() for p in self._trunk.parameters()]
        self._source = self._capture()
        self.source_accuracy = self._kept()

    def problem(self, shots: int, seed: int) -> Problem:
        """``shots`` images of each of the digits 5 to 9, drawn from the seed, on the network as the source left it."""
        with torch.no_grad():
            for parameter, start in zip(self._trunk.parameters(), self._start, strict=True):
                parameter.copy_(start)
                parameter.grad = None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = nn.Linear(_WIDTH, 10 - _KNOWN)
        generator = random.Random(seed)
        pool = [int(i) for i in self._train if self._labels[i] >= _KNOWN]
        rows = [
            row
            for digit in range(_KNOWN, 10)
            for row in generator.sample([i for i in pool if self._labels[i] == digit], shots)
        ]
        rest = torch.tensor(sorted(set(pool) - set(rows)))
        test = self._test[self._labels[self._test] >= _KNOWN]
        live: Iterator[list[int]] = batches(len(self._known), _BATCH, seed)

        def logits(images: Tensor) -> Tensor:
            found: Tensor = head(self._trunk(images))
            return found

        def loss(chosen: Tensor) -> Tensor:
            return cross_entropy(logits(self._images[chosen]), self._labels[chosen] - _KNOWN)

        def right(chosen: Tensor) -> float:
            with torch.no_grad():
                found = logits(self._images[chosen]).argmax(dim=1)
            return float((found == self._labels[chosen] - _KNOWN).float().mean())

        def pool_loss() -> Iterable[tuple[int, Tensor]]:
            yield len(rest), loss(rest)

        def few(numbers: Sequence[int]) -> Tensor:
            return loss(torch.tensor([rows[number] for number in numbers]))

        return Problem(
            adapter=list(self._trunk.named_parameters()),
            head=list(head.parameters()),
            rows=len(rows),
            classes=10 - _KNOWN,
            loss=few,
            source_loss=[lambda: self._source_loss(self._known[next(live)])],
            sources=(self._source,),
            pool_loss=pool_loss,
            accuracy=lambda: {"target": right(test), "source": self._kept()},
            probe=lambda: right(test),
        )

    def _source_loss(self, rows: Tensor) -> Tensor:
        return cross_entropy(self._head(self._trunk(self._images[rows])), self._labels[rows])

    def _learn(self) -> None:
        parameters = [*self._trunk.parameters(), *self._head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        stream = batches(len(self._known), 32, 0)
        for _ in range(_SOURCE_STEPS):
            optimizer.zero_grad()
            self._source_loss(self._known[next(stream)]).backward()
            optimizer.step()

    def _capture(self) -> SourceGradient:
        generator = torch.Generator().manual_seed(0)

        def sampled(_: nn.Module, batch: Tensor) -> Tensor:
            found = self._head(self._trunk(self._images[batch]))
            drawn = torch.multinomial(found.detach().softmax(dim=1), 1, generator=generator).squeeze(1)
            return cross_entropy(found, drawn)

        return SourceGradient.capture(
            self._trunk, list(self._known.split(_BATCH)), lambda _, batch: self._source_loss(batch), curvature=sampled
        )

    @torch.no_grad()
    def _kept(self) -> float:
        test = self._test[self._labels[self._test] < _KNOWN]
        found = self._head(self._trunk(self._images[test])).argmax(dim=1)
        return float((found == self._labels[test]).float().mean())
