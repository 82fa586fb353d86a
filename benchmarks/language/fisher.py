"""Diagonal Fisher information over the changed weights W, as EWC-LoRA (arXiv 2602.17559) uses it, by groups of layers.

Layers of one shape are one group, so that a step launches few operations on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.language.model import Language, grads
from gradguide.integrations.sampling import sampled_loss

__all__ = ["DiagonalFisher", "ProductPull", "diagonal_fisher", "groups"]

Groups = list[list[Any]]


def groups(model: Language) -> Groups:
    """Return the adapted layers in groups of one shape."""
    found: dict[tuple[int, int], list[Any]] = {}
    for _, layer in model.layers():
        found.setdefault((layer.in_features, layer.out_features), []).append(layer)
    return list(found.values())


def factors(model: Language, layers: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return A and B of each layer of a group."""
    pairs = [model.factors(layer) for layer in layers]
    return [a for a, _ in pairs], [b for _, b in pairs]


@torch.no_grad()
def change(model: Language, layers: Sequence[Any]) -> Tensor:
    """Return the change of the weights of a group: scale * B A, [layers, out, in]."""
    a, b = factors(model, layers)
    return model.scale * torch.bmm(torch.stack(b), torch.stack(a))


class DiagonalFisher:
    """Fisher information of one task and the change of the weights at its end, per group [layers, out, in].

    The KL from that point is about ``1/2 sum(F * (change - anchor)^2)`` nats per token.
    """

    def __init__(self, fisher: list[Tensor], anchor: list[Tensor] | None) -> None:
        self.fisher = fisher
        self.pulled = None if anchor is None else [f * d for f, d in zip(fisher, anchor, strict=True)]

    def add(self, earlier: DiagonalFisher) -> None:
        """Add the penalty of earlier tasks: the sum of both has the memory of one."""
        torch._foreach_add_(self.fisher, earlier.fisher)
        if self.pulled is None:
            self.pulled = earlier.pulled
        elif earlier.pulled is not None:
            torch._foreach_add_(self.pulled, earlier.pulled)


def diagonal_fisher(model: Language, batches: Iterable[dict[str, Tensor]]) -> DiagonalFisher:
    """Return the diagonal Fisher information of the present model: mean squares of the gradients of whole sequences.

    Labels are drawn from the model. At an adapter of zero there is no anchor.
    """
    grouped = groups(model)
    sums = [
        torch.zeros(len(layers), layers[0].out_features, layers[0].in_features, device=model.device)
        for layers in grouped
    ]
    place = {id(layer): sums[g][i] for g, layers in enumerate(grouped) for i, layer in enumerate(layers)}
    predictions, number = 0, [0]

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = arguments[0].detach().float()

        def add(gradient: Tensor) -> None:
            # Of the summed log likelihood: the loss is a mean over the batch's predictions.
            whole = torch.bmm(gradient.float().mT, inputs) * number[0]
            place[id(module)].add_(whole.square_().sum(0))

        output.register_hook(add)

    handles = [layer.register_forward_hook(keep) for _, layer in model.layers()]
    try:
        for batch in batches:
            loss, number[0] = sampled_loss(model.model, batch)
            loss.backward()
            predictions += number[0]
    finally:
        for handle in handles:
            handle.remove()
        model.clear()
    for each in sums:
        each.div_(predictions)
    anchor = [change(model, layers) for layers in grouped]
    return DiagonalFisher(sums, anchor if any(bool(d.any()) for d in anchor) else None)


class ProductPull:
    """Adds the gradient of ``weight / 2 * sum(F * (change - anchor)^2)`` to the gradients of A and B.

    Args:
        fisher: F and the anchor; None for F = 1 and the present change as anchor (L2-SP on the product B A).
    """

    def __init__(self, model: Language, fisher: DiagonalFisher | None, weight: float) -> None:
        self._model = model
        self._weight = weight
        self._groups = groups(model)
        self._fisher = None if fisher is None else fisher.fisher
        if fisher is None:
            start = [change(model, layers) for layers in self._groups]
            self._pulled = start if any(bool(d.any()) for d in start) else None
        else:
            self._pulled = fisher.pulled

    @torch.no_grad()
    def __call__(self) -> None:
        """Change the gradients."""
        scale = self._model.scale
        for index, layers in enumerate(self._groups):
            a, b = factors(self._model, layers)
            stacked_a, stacked_b = torch.stack(a), torch.stack(b)
            pull = torch.bmm(stacked_b, stacked_a).mul_(scale)
            if self._fisher is not None:
                pull.mul_(self._fisher[index])
            if self._pulled is not None:
                pull.sub_(self._pulled[index])
            of_b, of_a = torch.bmm(pull, stacked_a.mT), torch.bmm(stacked_b.mT, pull)
            pairs = [*zip(a, of_a, strict=True), *zip(b, of_b, strict=True)]
            torch._foreach_add_(grads(p for p, _ in pairs), [part for _, part in pairs], alpha=self._weight * scale)
