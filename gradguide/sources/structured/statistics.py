"""Running sums of a linear layer over source text, and the factors computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

from gradguide.ops.tensors import to_float64, wide_dtype
from gradguide.sources.structured.factors import Covariance, Factor, stacked
from gradguide.sources.structured.layers import Layer

__all__ = ["LayerStatistics", "Moments"]

LEAST = 1e-28
"""Added to the squared length of each gradient. If all gradients are 0, the inputs then have their plain covariance."""


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
        weights = d.square().sum(1, keepdim=True) + LEAST
        self.inputs.add(x * weights.sqrt())
        self.outputs.add(d * torch.linalg.vector_norm(x, dim=1, keepdim=True))
        self.squares += weights.sum()

    def factors(self, predictions: int) -> tuple[Factor, Factor]:
        """Return S, a weighted mean of ``x x^T``, and G, so that ``1/2 tr(D^T G D S)`` is nats per prediction."""
        squares, products = float(self.squares), float(to_float64(self.inputs.diagonal).sum())
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

    tokens: moments of the centered inputs and the gradients of tokens.
    sequences: moments of the mean inputs and the summed gradients of sequences.
    scalars: number of tokens, sum of squares of the output, number of sequences.
    """

    def __init__(self, layer: Layer, rank: int | None, device: torch.device) -> None:
        self.tokens = Moments(layer, rank, device)
        self.sequences = Moments(layer, rank, device)
        self.scalars = torch.zeros(3, dtype=wide_dtype(device), device=device)

    def add_outputs(self, y: Tensor, mask: Tensor | None) -> None:
        """Add outputs [sequences, tokens, out]. ``mask`` (bool) [sequences, tokens] selects the tokens that count."""
        lengths = torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32)
        used = lengths if mask is None else lengths.masked_fill(~mask, 0.0)
        self.scalars[0] += lengths.numel() if mask is None else mask.sum()
        self.scalars[1] += torch.linalg.vector_norm(used, dtype=self.scalars.dtype).square()
        self.scalars[2] += len(y)

    def add(self, x: Tensor, d: Tensor, mask: Tensor | None) -> None:
        """Add inputs [sequences, tokens, in] and gradients [sequences, tokens, out] of the summed loss."""
        x, d = x.float(), d.float()
        counts: int | Tensor = x.shape[1]
        if mask is not None:
            padding = ~mask[..., None]
            x, d = x.masked_fill(padding, 0.0), d.masked_fill(padding, 0.0)
            counts = mask.sum(1, keepdim=True).clamp(min=1)
        means = x.sum(1) / counts
        self.sequences.add(means, d.sum(1))
        if x.shape[1] > 1:
            # A masked token has no gradient, so its centered input has no weight.
            self.tokens.add((x - means[:, None]).flatten(0, 1), d.flatten(0, 1))

    @property
    def reached(self) -> bool:
        """Whether a gradient was added, even if it was 0."""
        return bool(self.sequences.squares > 0)

    def factors(self, predictions: int) -> tuple[Factor, Factor]:
        """Return S and G of both pairs, stacked: tokens first."""
        inputs, outputs = zip(self.tokens.factors(predictions), self.sequences.factors(predictions), strict=True)
        return stacked(inputs), stacked(outputs)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """All sums. They are linear in the tokens, so those of several processes are added."""
        return *self.tokens.sums, *self.sequences.sums, self.scalars
