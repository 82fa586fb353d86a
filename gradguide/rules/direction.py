"""Direction consistency: the running direction of the gradients, and damping of the part orthogonal to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradguide.rules.span import Span, divide
from gradguide.utils.checks import check_flag, check_range

__all__ = ["Average", "Direction", "accumulate", "coherence", "damp", "evidence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """Keep a running direction d of the gradients, and shrink the part of each gradient that is orthogonal to it.

    ``d <- decay * d + (1 - decay) * g / |g|``, where g is the gradient *as received*: an average of guided gradients
    would reinforce itself. d is kept in float32 and does not depend on the scale of the gradients.

    The guided gradient is ``(1 - k) g + k P g``, where P projects onto the ray along d. Its cosine with d is never
    below that of g, and it is never longer than g. ``k = damping * evidence``. The evidence, in [0, 1], is the
    agreement of the recent gradients beyond that of as many random ones (0 at the first step).

    A parameter without a gradient keeps its part of d for that step, as the base keeps its momentum. The mass of its
    scope decays. So the coherence is too high in a scope whose parameters lack gradients in turn, up to 1. Give such
    parameters scopes of their own, or gradients of zero.

    A GradGuide has no direction by default: in the evaluation, runs with and without one had the same results.

    Source: "gradient direction consistency", abstract of arXiv 2506.00726; the mean resultant length is that of
    directional statistics (Mardia and Jupp, 2000).

    Args:
        decay (float): decay of the running direction, in [0, 1); it averages over about 1 / (1 - decay) steps.
        damping (float): share of the orthogonal part that is removed at evidence 1, in [0, 1]. 0 only measures.
        share_momentum (bool): use the base optimizer's ``exp_avg`` or ``momentum_buffer`` as d, which saves a row. The
            base's decay then replaces ``decay``.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    decay: float = 0.95
    damping: float = 0.5
    share_momentum: bool = False

    def __post_init__(self) -> None:
        check_range("decay", self.decay, 0, 1, open_high=True)
        check_range("damping", self.damping, 0, 1)
        check_flag("share_momentum", self.share_momentum)


class Average(NamedTuple):
    """Statistics of a running sum ``d = sum_i w_i x_i``, per scope.

    mass (Tensor): shape [S], ``sum_i w_i |x_i|``, the length of d if all x_i had one direction.
    square (Tensor): shape [S], ``sum_i (w_i |x_i|)^2``, the expected squared length of d for random directions.
    """

    mass: Tensor
    square: Tensor


def coherence(length: Tensor, average: Average) -> Tensor:
    """Return the mean resultant length of the recent gradients: 1 if they agree, near 0 for noise. Tensor [S]."""
    return divide(length, average.mass).clamp(0.0, 1.0)


def evidence(length: Tensor, average: Average) -> Tensor:
    """Return the coherence beyond chance: Tensor [S].

    It is ``sqrt((R^2 - R0^2) / (1 - R0^2))``, where R is the coherence and R0 that expected of unrelated gradients.
    """
    r2 = coherence(length, average).square()
    chance = divide(average.square, average.mass.square()).clamp(0.0, 1.0)
    # After a single gradient the chance is 1, and the denominator is only rounding error. The evidence is then 0.
    room = torch.where(1.0 - chance > 1e-6, 1.0 - chance, 0.0)
    return divide((r2 - chance).clamp(min=0.0), room).clamp(0.0, 1.0).sqrt()


def damp(span: Span, gradient: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """Shrink the part of the gradient that is orthogonal or opposite to the direction.

    Args:
        span: the rows.
        gradient (Tensor): coordinates [S, R].
        direction (Tensor): coordinates [S, R] of d. Scopes with d = 0 stay unchanged.
        strength (Tensor): shape [S], in [0, 1].

    Returns:
        Coordinates [S, R]. At strength 1 the operation is idempotent.
    """
    length = span.norm(direction)
    along = divide(span.inner(gradient, direction).clamp(min=0.0), length.square())
    strength = torch.where(length > 0, strength, 0.0).unsqueeze(1)
    return (1.0 - strength) * gradient + strength * along.unsqueeze(1) * direction


def accumulate(
    direction: Tensor, term: Tensor, length: Tensor, average: Average, decay: Tensor, gain: Tensor
) -> tuple[Tensor, Average]:
    """Advance the running sum by one step: ``d' = decay * d + gain * x``.

    A term of length 0 leaves direction and average unchanged.

    Args:
        direction, term (Tensor): coordinates [S, R] of d and x.
        length (Tensor): shape [S], |x|.
        average: mass and square of d.
        decay, gain (Tensor): shape [S].

    Returns:
        Coordinates [S, R] of d', and its statistics.
    """
    moved = length > 0
    mass = torch.where(moved, decay * average.mass + gain * length, average.mass)
    square = torch.where(moved, decay.square() * average.square + (gain * length).square(), average.square)
    new = decay.unsqueeze(1) * direction + gain.unsqueeze(1) * term
    return torch.where(moved.unsqueeze(1), new, direction), Average(mass, square)
