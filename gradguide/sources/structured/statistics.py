"""Running sums of a linear layer over source text, and the factors computed from them.

Capture runs this for each layer and batch, so that launches of small operations set its speed on a GPU. What is one
vector per sequence is kept until some batches of it can be added at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradguide.ops.tensors import wide_dtype
from gradguide.sources.structured.factors import Covariance, Factor, stacked
from gradguide.sources.structured.layers import Layer

__all__ = ["BUFFERED", "LayerStatistics", "Mask", "Moments"]

LEAST = 1e-28
"""Smallest weight of an input. If all gradients are 0, the inputs then have their plain covariance."""

BUFFERED = 32
"""Sequences that a layer keeps before it adds their vectors to its sums."""


@dataclass(frozen=True, eq=False)
class Mask:
    """The tokens of a batch that count: ``kept`` (bool) [sequences, tokens], ``number`` of them."""

    kept: Tensor
    number: int

    @staticmethod
    def of(attention: Tensor) -> Mask | None:
        """Return the mask of an attention mask [sequences, tokens]; None if all tokens count."""
        kept = attention != 0
        number = int(kept.sum())
        return None if number == kept.numel() else Mask(kept, number)

    def to(self, device: torch.device) -> Mask:
        """Return the mask on another device, or itself."""
        return self if device == self.kept.device else Mask(self.kept.to(device), self.number)

    @cached_property
    def dropped(self) -> Tensor:
        """The tokens that do not count: Tensor [sequences, tokens, 1], bool."""
        return ~self.kept.unsqueeze(-1)

    @cached_property
    def counts(self) -> Tensor:
        """Number of tokens of each sequence, at least 1: Tensor [sequences, 1]."""
        return self.kept.sum(1, keepdim=True).clamp(min=1)


class Moments:
    """Sums over pairs of an input x and an output gradient d: ``sum |d|^2 x x^T`` and ``sum |x|^2 d d^T``.

    They give ``sum (d^T D x)^2`` as if the directions of x and d were independent, with weights ``|x|^2 |d|^2``. Plain
    moments ignore that long inputs have gradients of their own kind, such as those of the first token of a text.
    """

    def __init__(self, layer: Layer, rank: int | None, device: torch.device) -> None:
        outputs, inputs = layer.shape
        self.inputs = Covariance(inputs, rank, device)
        self.outputs = Covariance(outputs, rank, device)
        self.squares = torch.zeros((), dtype=wide_dtype(device), device=device)

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add pairs: x [m, in] and d [m, out], float32."""
        squared_x, squared_d = x.square(), d.square()
        weights = squared_d.sum(1).clamp_(min=LEAST)
        self.inputs.add(x, squared_x, weights)
        self.outputs.add(d, squared_d, squared_x.sum(1))
        self.squares += weights.sum(dtype=self.squares.dtype)

    def factors(self, predictions: int) -> tuple[Factor, Factor]:
        """Return S, a weighted mean of ``x x^T``, and G, so that ``1/2 tr(D^T G D S)`` is nats per prediction."""
        squares, products = torch.stack([self.squares, self.inputs.diagonal.sum(dtype=self.squares.dtype)]).tolist()
        scale = squares / products / predictions if products > 0 else 0.0
        return self.inputs.factor(1.0 / squares if squares > 0 else 0.0), self.outputs.factor(scale)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """All sums. They are linear in the pairs, so those of several processes are added."""
        return self.inputs.sums, self.inputs.diagonal, self.outputs.sums, self.outputs.diagonal, self.squares


class LayerStatistics:
    """Running sums of one layer. ``rank`` is that of each pair of factors.

    A change D of the layer changes log p of a sequence by ``sum_t d_t^T D x_t``, t being its tokens. With the mean
    input m of the sequence this is ``sum_t d_t^T D (x_t - m)``, whose terms count as independent, plus
    ``(sum_t d_t)^T D m`` (KFAC-expand and KFAC-reduce, arXiv 2311.00636).

    The vectors of up to ``BUFFERED`` sequences, and those of the last batch, are not in the sums before :meth:`flush`.

    tokens: moments of the centered inputs and the gradients of tokens.
    sequences: moments of the mean inputs and the summed gradients of sequences.
    scalars: number of tokens, sum of squares of the output, number of sequences.
    """

    def __init__(self, layer: Layer, rank: int | None, device: torch.device) -> None:
        self.tokens = Moments(layer, rank, device)
        self.sequences = Moments(layer, rank, device)
        self.scalars = torch.zeros(3, dtype=wide_dtype(device), device=device)
        self._clear()

    def _clear(self) -> None:
        self._numbers = [0, 0]  # tokens and sequences
        self._lengths: list[Tensor] = []  # of the outputs of sequences
        self._means: list[Tensor] = []
        self._totals: list[Tensor] = []  # summed gradients
        self._waiting = 0  # sequences in the two lists above

    def add_outputs(self, y: Tensor, mask: Mask | None) -> None:
        """Add outputs [sequences, tokens, out]."""
        # The length of a token first: on CPUs, the float32 norm of many elements is not precise.
        lengths = torch.linalg.vector_norm(_narrowed(y), dim=-1, dtype=torch.float32)
        if mask is not None:
            lengths = lengths.masked_fill(mask.dropped.squeeze(-1), 0.0)
        self._lengths.append(torch.linalg.vector_norm(lengths, dim=-1))
        self._numbers[0] += lengths.numel() if mask is None else mask.number
        self._numbers[1] += len(y)

    def add(self, x: Tensor, d: Tensor, mask: Mask | None) -> None:
        """Add inputs [sequences, tokens, in] and gradients [sequences, tokens, out] of the summed loss."""
        d = d.float()
        x = _narrowed(x)  # half precision becomes float32 with the means
        if mask is None:
            means = x.mean(1, dtype=torch.float32)
        else:
            x, d = x.float().masked_fill(mask.dropped, 0.0), d.masked_fill(mask.dropped, 0.0)
            means = x.sum(1) / mask.counts
        self._means.append(means)
        self._totals.append(d.sum(1))
        self._waiting += len(x)
        if x.shape[1] > 1:
            with torch.autocast(x.device.type, enabled=False):
                # A masked token has no gradient, so its centered input has no weight.
                self.tokens.add((x - means.unsqueeze(1)).flatten(0, 1), d.flatten(0, 1))
        if self._waiting >= BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Add what is kept to the sums."""
        for index, number in zip((0, 2), self._numbers, strict=True):
            self.scalars[index] += number
        if self._lengths:
            self.scalars[1] += torch.cat(self._lengths).square().sum(dtype=self.scalars.dtype)
        if self._means:
            with torch.autocast(self.scalars.device.type, enabled=False):
                self.sequences.add(torch.cat(self._means), torch.cat(self._totals))
        self._clear()

    @property
    def reached(self) -> bool:
        """Whether a gradient was added, even if it was 0."""
        return bool(self.sequences.squares > 0)

    @property
    def finite(self) -> bool:
        """Return whether all sums are finite."""
        dtype = self.scalars.dtype
        return bool(torch.stack([part.sum(dtype=dtype) for part in self.sums]).isfinite().all())

    def factors(self, predictions: int) -> tuple[Factor, Factor]:
        """Return S and G of both pairs, stacked: tokens first."""
        with torch.autocast(self.scalars.device.type, enabled=False):
            inputs, outputs = zip(self.tokens.factors(predictions), self.sequences.factors(predictions), strict=True)
        return stacked(inputs), stacked(outputs)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """All sums. They are linear in the tokens, so those of several processes are added."""
        return *self.tokens.sums, *self.sequences.sums, self.scalars


def _narrowed(tensor: Tensor) -> Tensor:
    """Return a float64 tensor as float32, and others unchanged."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor
