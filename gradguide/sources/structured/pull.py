"""Compute the pull of a structured source on the parameters of several layers of one shape, batched over layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradguide.sources.structured.factors import Factor

__all__ = ["adapter_pull", "weight_pull"]


def adapter_pull(
    inputs: Factor, outputs: Factor, floor: Tensor, left: Tensor, right: Tensor, adapters: Sequence[tuple[int, float]]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Differentiate ``1/2 sum tr(D^T G D S)`` over K pairs of G and S for ``D = left @ right``, without forming D.

    Args:
        inputs, outputs: S and G of L layers, stacked: [K * L, ...], one pair of all layers after the other.
        floor (Tensor): shape [K * L, 1, 1], added to the diagonal of G for the gradient.
        left, right (Tensor): shapes [L, out, R] and [L, R, in]: ``scale * B`` and A of all adapters, concatenated along
            the rank dimension.
        adapters: rank r and scale of each adapter.

    Returns:
        For each adapter the gradients with respect to A [L, r, in] and B [L, out, r]; and the value without the floor,
        in nats per token, by pair and layer: Tensor [K * L].
    """
    layers = len(left)
    pairs = len(floor) // layers
    left, right = left.repeat(pairs, 1, 1), right.repeat(pairs, 1, 1)
    right_s = inputs.apply(right)
    g_left = outputs.apply(left.mT).mT
    between = torch.bmm(right_s, right.mT)
    drift = 0.5 * (torch.bmm(left.mT, g_left) * between).sum(dim=(1, 2))
    g_left = torch.addcmul(g_left, floor, left)
    found, first = [], 0
    for rank, scale in adapters:
        own = slice(first, first + rank)
        # ``left`` includes the scale.
        a_pull = torch.bmm(torch.bmm(left[..., own].mT, g_left), right_s)
        b_pull = torch.bmm(g_left, scale * between[..., own])
        found.append((a_pull.unflatten(0, (pairs, layers)).sum(0), b_pull.unflatten(0, (pairs, layers)).sum(0)))
        first += rank
    return found, drift


def weight_pull(inputs: Factor, outputs: Factor, floor: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate ``1/2 sum tr(D^T G D S)`` over K pairs of G and S with respect to D of one layer.

    Args:
        inputs, outputs, floor: see :func:`adapter_pull`.
        moved (Tensor): shape [1, out, in], D.

    Returns:
        The sum of ``G D S`` with the floor, [1, out, in]; and the value without it, in nats per token, by pair: [K].
    """
    pull, drifts = torch.zeros_like(moved), []
    for s, g, least in zip(inputs.unstacked(), outputs.unstacked(), floor, strict=True):
        moved_s = s.apply(moved)
        curved = g.apply(moved_s.mT).mT
        drifts.append(0.5 * (moved * curved).sum())
        pull += curved.addcmul(least, moved_s)
    return pull, torch.stack(drifts)
