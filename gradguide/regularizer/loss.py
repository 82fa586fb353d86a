"""The exact objective as a plain function, for training loops that call backward themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gradguide.rules.span import divide
from gradguide.sources.protocol import Source, sources_of
from gradguide.sources.structured import StructuredSource
from gradguide.utils.checks import check_range

__all__ = ["guided_loss"]


def guided_loss(
    loss: Tensor,
    parameters: Iterable[tuple[str, Tensor]],
    *,
    direction: Mapping[str, Tensor] | None = None,
    sources: Source | Sequence[Source] = (),
    direction_weight: float = 0.0,
    magnitude_weight: float = 0.0,
    alignment_weight: float = 0.0,
) -> Tensor:
    """Return ``L + R``. Its ``backward()`` computes the gradient that :class:`gradguide.Regularizer` uses.

    ``R(g) = direction_weight * (1 - cos(g, d)) + magnitude_weight * |g|^2 + alignment_weight * sum_k (1 - cos(g,
    s_k))`` over all parameters together. d and the source gradients s_k at the current parameters are constants.
    The gradient g is computed with its graph, so every operation must be twice differentiable.

    Args:
        loss (Tensor): a scalar with its graph.
        parameters: ``model.named_parameters()`` or a part of it. Frozen parameters, and those that the loss does not
            use, are left out.
        direction: d by name, for all remaining parameters.
        sources: one source or several, for all remaining parameters. Each is refreshed: a ``ReplaySource`` evaluates
            its next batch, and does not keep buffers of a compiled model. A ``StructuredSource`` must be bound first:
            ``source.bound(model)``.
        direction_weight, magnitude_weight, alignment_weight (float): at least 0.

    Returns:
        Tensor: a scalar; ``loss`` itself if all weights are 0.

    Raises:
        ValueError: a weight is negative or lacks its direction or source, the loss depends on no parameter, or a name
            is missing from ``direction`` or a source. A structured source pulls none of the parameters.
        TypeError: a source does not implement the protocol.
    """
    weights = {"direction": direction_weight, "magnitude": magnitude_weight, "alignment": alignment_weight}
    for name, weight in weights.items():
        check_range(f"{name}_weight", weight, 0, float("inf"), open_high=True)
    source_list = sources_of(sources)
    if direction_weight > 0 and direction is None:
        raise ValueError(f"direction_weight={direction_weight} needs a direction, found None")
    if alignment_weight > 0 and not source_list:
        raise ValueError(f"alignment_weight={alignment_weight} needs a source, found none")
    if not any(weights.values()):
        return loss
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    if not trained or not loss.requires_grad:
        raise ValueError("the loss depends on no trainable parameter")
    found = torch.autograd.grad(loss, [p for _, p in trained], create_graph=True, allow_unused=True)
    used = [(name, p, g) for (name, p), g in zip(trained, found, strict=True) if g is not None]
    if not used:
        raise ValueError("the loss depends on none of the parameters given")
    names, values, gradients = (list(part) for part in zip(*used, strict=True))
    required: list[tuple[str, Iterable[str]]] = []
    if direction is not None and direction_weight > 0:
        required.append(("direction", direction))
    if alignment_weight > 0:
        required += [(f"source {k}", source.shapes() or names) for k, source in enumerate(source_list)]
    for label, held in required:
        missing = [name for name in names if name not in held]
        if missing:
            raise ValueError(f"{label} lacks {len(missing)} of the parameters ({', '.join(missing[:5])})")
    for k, source in enumerate(source_list if alignment_weight > 0 else ()):
        if isinstance(source, StructuredSource) and source.pulled.isdisjoint(names):
            raise ValueError(
                f"source {k} pulls none of the parameters ({', '.join(names[:5])}): pass source.bound(model), and the "
                "names of that model"
            )
    g = torch.cat([gradient.reshape(-1) for gradient in gradients])
    total = loss + magnitude_weight * g.square().sum()
    if direction is not None and direction_weight > 0:
        d = torch.cat([direction[name].detach().to(p).reshape(-1) for name, p in zip(names, values, strict=True)])
        total = total + direction_weight * (1.0 - _cosine(g, d))
    for source in source_list if alignment_weight > 0 else ():
        source.refresh(dict(zip(names, values, strict=True)), [p for _, p in trained])
        row = source.row(names, [p.detach() for p in values])
        s = torch.cat([row.value(index, g.dtype) for index in range(len(names))])
        total = total + alignment_weight * (1.0 - _cosine(g, s))
    return total


def _cosine(g: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of two vectors; 1 (no term) if one of them is zero."""
    lengths = torch.linalg.vector_norm(g) * torch.linalg.vector_norm(other)
    return torch.where(lengths > 0, divide(torch.dot(g, other), lengths), 1.0)
