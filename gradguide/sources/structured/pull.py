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
        inputs, outputs: S and G of L layers, stacked: [K, L, ...].
        floor (Tensor): shape [L], added to the diagonal of G for the gradient.
        left, right (Tensor): shapes [L, out, R] and [L, R, in]: ``scale * B`` and A of all adapters, concatenated along
            the rank dimension.
        adapters: rank r and scale of each adapter.

    Returns:
        For each adapter the gradients with respect to A [L, r, in] and B [L, out, r]; and the value without the floor,
        Tensor [L], in nats per token.
    """
    right_s = inputs.apply(right)
    g_left = outputs.apply(left.mT).mT
    between = right_s @ right.mT
    drift = 0.5 * ((left.mT @ g_left) * between).sum(dim=(0, -2, -1))
    g_left = torch.addcmul(g_left, floor[:, None, None], left)
    found, first = [], 0
    for rank, scale in adapters:
        own = slice(first, first + rank)
        # ``left`` includes the scale.
        a_pull = ((left[..., own].mT @ g_left) @ right_s).sum(dim=0)
        found.append((a_pull, (g_left @ (scale * between[..., own])).sum(dim=0)))
        first += rank
    return found, drift


def weight_pull(inputs: Factor, outputs: Factor, floor: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate ``1/2 sum tr(D^T G D S)`` over K pairs of G and S with respect to D itself.

    Args:
        moved (Tensor): shape [L, out, in], D.

    Returns:
        The sum of ``G D S`` with the floor, [L, out, in]; and the value without it, Tensor [L], in nats per token.
    """
    pull, drift = torch.zeros_like(moved), moved.new_zeros(len(moved))
    for s, g in zip(inputs.unbind(), outputs.unbind(), strict=True):  # one pair at a time, for less memory
        moved_s = s.apply(moved)
        curved = g.apply(moved_s.mT).mT
        drift += 0.5 * (moved * curved).sum(dim=(-2, -1))
        pull += torch.addcmul(curved, floor[:, None, None], moved_s)
    return pull, drift
