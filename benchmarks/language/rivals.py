"""Rivals: penalties on the parameters, loss terms on text, and stopping early.

The method's strength is the weight of the penalty or term, and the budget of ``early`` in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.language.fisher import DiagonalFisher, ProductPull
from benchmarks.language.model import grads, kl, token_loss
from benchmarks.language.training import Setup, Term, Training
from gradguide import SourceGradient

__all__ = ["early", "ewc", "ewc_lora", "kl_term", "l2sp", "l2sp_product", "replay"]

_CHECK_EVERY = 4
_CHECK_WINDOWS = 8


def l2sp(setup: Setup) -> Training:
    """Pull A and B to their start (L2-SP, arXiv 1802.01483), then clip."""
    parameters: list[Tensor] = list(setup.model.parameters)
    start = [p.detach().clone() for p in parameters]

    def pull() -> None:
        gradients = grads(parameters)
        torch._foreach_add_(gradients, parameters, alpha=setup.method.strength)
        torch._foreach_sub_(gradients, start, alpha=setup.method.strength)

    return setup.clipped(pull)


def l2sp_product(setup: Setup) -> Training:
    """Pull scale * B A to its start, then clip."""
    pull = ProductPull(setup.model, None, setup.method.strength)
    return setup.clipped(pull)


def ewc(setup: Setup) -> Training:
    """Pull A and B by the diagonal Fisher information of each task (EWC, arXiv 1612.00796), then clip.

    ``strength / 2 * sum_k sum(F_k (theta - theta_k)^2)``, where F is in nats per token.
    """
    held: Sequence[SourceGradient] = setup.kept
    device = setup.model.device
    parameters: list[Tensor] = list(setup.model.parameters)
    names = [name for name, _ in setup.model.named]
    tables = [
        ([source.fisher[n].to(device) for n in names], [source.anchor[n].to(device) for n in names]) for source in held
    ]

    def pull() -> None:
        gradients = grads(parameters)
        for fisher, anchor in tables:
            far = [p.detach().clone() for p in parameters]
            torch._foreach_sub_(far, anchor)
            torch._foreach_mul_(far, fisher)
            torch._foreach_add_(gradients, far, alpha=setup.method.strength)

    return setup.clipped(pull, held=tables)


def ewc_lora(setup: Setup) -> Training:
    """Pull by the diagonal Fisher information over the changed weights (EWC-LoRA, arXiv 2602.17559), then clip.

    The penalties of several tasks are one, with the memory of one.
    """
    if not setup.kept:
        return setup.clipped()
    total: DiagonalFisher = setup.kept[-1]
    return setup.clipped(ProductPull(setup.model, total, setup.method.strength), held=(total.fisher, total.pulled))


def kl_term(setup: Setup) -> Training:
    """Add KL(start || now) on text (option ``text``: "own" or "real"). The start's states are computed before the run.

    Option ``every``: only each such step has the term, at the same weight.
    """
    model, windows = setup.model, setup.sources.windows(setup.method.options["text"])
    with torch.no_grad():
        start = torch.cat([model.hidden(part) for part in windows.split(64)])

    def loss(ids: Tensor, before: Tensor) -> Tensor:
        return kl(model, model.hidden(ids).flatten(0, 1), before.flatten(0, 1))

    return _with_term(setup, Term(key="kl", loss=loss, inputs=(windows, start), **_term_options(setup)))


def replay(setup: Setup) -> Training:
    """Add the loss of text (option ``text``: "real" or "own"), in each step or each ``every``-th one."""

    def loss(ids: Tensor) -> Tensor:
        return token_loss(setup.model, ids)

    windows = setup.sources.windows(setup.method.options["text"])
    return _with_term(setup, Term(key="replay", loss=loss, inputs=(windows,), **_term_options(setup)))


def early(setup: Setup) -> Training:
    """Clip, and keep the last adapter whose drift on 8 windows of source text is within the budget.

    The drift is measured every 4 steps; the adapter of before the first measurement counts as within. Steps after the
    budget is spent change nothing in the end. They are made all the same, so that no step waits for the device.
    """
    model = setup.model
    windows = setup.sources.windows("real")[:_CHECK_WINDOWS]
    held = [p.detach().clone() for p in model.parameters]
    within = torch.ones((), dtype=torch.bool, device=model.device)
    with torch.no_grad():
        start = model.hidden(windows).flatten(0, 1)

    @torch.no_grad()
    def after(step: int) -> None:
        if step % _CHECK_EVERY:
            return
        drift = kl(model, model.hidden(windows).flatten(0, 1), start)
        within.logical_and_(drift <= setup.method.strength)
        for kept, p in zip(held, model.parameters, strict=True):
            kept.copy_(torch.where(within, p, kept))

    @torch.no_grad()
    def end() -> None:
        torch._foreach_copy_(list[Tensor](model.parameters), held)

    return setup.clipped(after=after, end=end, held=(windows, start))


def _term_options(setup: Setup) -> dict[str, Any]:
    return {"weight": setup.method.strength, "every": int(setup.method.options["every"])}


def _with_term(setup: Setup, term: Term) -> Training:
    return setup.clipped(term=term, held=term.inputs)
