"""The methods compared. A method is a string: a name, a strength for some, and options: ``structured rank=16``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.language.model import Language, kl, token_loss
from benchmarks.language.sources import TOKENS, WHOLE, OwnText, Sources, Spec
from gradguide import Alignment, GradGuide, Magnitude

__all__ = ["METHODS", "Method", "Term", "Training", "needs", "parse", "set_up"]

_COMMON = {"unit": "token", "base": "adamw"}
_STRUCTURED = {
    "weight": "100", "rank": "64", "rest": "diag", "floor": "0.1", "text": "real", "tokens": str(TOKENS),
    "start": "random", "direction": "on", "bound": "on",
}  # fmt: skip
_SGD_RATE = 100.0
"""SGD's learning rate relative to AdamW's. With 5 M parameters, an update has about the same length."""
_TEXT_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Method:
    """A parsed method.

    Args:
        name: a key of ``METHODS``.
        strength: the number after the name.
        options: all options of the method, also those with their default. Options of every method: ``unit``, "token"
            or "row", see ``model.answer_loss``; ``base``, "adamw" or "sgd" (momentum 0.9).
    """

    name: str
    strength: float
    options: Mapping[str, str]

    @property
    def spec(self) -> Spec:
        """The structured source."""
        rank = self.options["rank"]
        return Spec(self.options["text"], _count(self.options["tokens"]), None if rank == "whole" else int(rank))


@dataclass(frozen=True, kw_only=True)
class Term:
    """A loss term on source text.

    Args:
        key: names the term, see ``model.Gradient``.
        loss: called with the tensors of ``inputs``.
        inputs: tensors with one entry per window of text. Each step uses those of 8 random windows.
    """

    key: str
    loss: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    batch: int = _TEXT_BATCH


@dataclass(frozen=True, kw_only=True)
class Training:
    """Optimizer and loss term of a method, for the steps of a run.

    Args:
        optimizer: makes the step.
        before: called between the gradient and the step.
        term: added to the loss.
    """

    optimizer: Optimizer
    before: Callable[[], None] = field(default=lambda: None)
    term: Term | None = None


@dataclass(frozen=True, kw_only=True)
class _Setup:
    model: Language
    sources: Sources
    lr: float
    method: Method

    def base(self, parameters: list[nn.Parameter] | None = None, rate: float = 1.0) -> Optimizer:
        """Return the base optimizer at ``rate`` times the learning rate."""
        chosen = self.model.parameters if parameters is None else parameters
        if self.method.options["base"] == "sgd":
            return torch.optim.SGD(chosen, lr=rate * self.lr * _SGD_RATE, momentum=0.9)
        fused = self.model.device.type == "cuda"
        return torch.optim.AdamW(chosen, lr=rate * self.lr, weight_decay=0.0, fused=fused)


def _clipped(base: Optimizer, term: Term | None = None) -> Training:
    parameters = [p for group in base.param_groups for p in group["params"]]

    def before() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)

    return Training(optimizer=base, before=before, term=term)


def _clip(setup: _Setup) -> Training:
    """Clip the gradient's norm at 1."""
    return _clipped(setup.base())


def _quarter(setup: _Setup) -> Training:
    """Clip, at a quarter of the learning rate."""
    return _clipped(setup.base(rate=0.25))


def _l2sp(setup: _Setup) -> Training:
    """Pull A and B to their start (L2-SP, arXiv 1802.01483), then clip."""
    parameters: list[Tensor] = list(setup.model.parameters)
    start = [p.detach().clone() for p in parameters]
    clipped = _clipped(setup.base())

    @torch.no_grad()
    def before() -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_add_(gradients, parameters, alpha=setup.method.strength)
        torch._foreach_sub_(gradients, start, alpha=setup.method.strength)
        clipped.before()

    return Training(optimizer=clipped.optimizer, before=before)


def _kl(setup: _Setup) -> Training:
    """Add KL(base || now) on text that the model wrote. The base's hidden states are computed once, before the run."""
    model, windows = setup.model, setup.sources.windows("own")
    with torch.no_grad():
        start = torch.cat([model.hidden(part) for part in windows.split(_TEXT_BATCH)])

    def loss(ids: Tensor, before: Tensor) -> Tensor:
        return setup.method.strength * kl(model, model.hidden(ids).flatten(0, 1), before.flatten(0, 1))

    return _clipped(setup.base(), Term(key=f"kl {setup.method.strength}", loss=loss, inputs=(windows, start)))


def _replay(setup: _Setup) -> Training:
    """Add the loss of source text."""

    def loss(ids: Tensor) -> Tensor:
        return setup.method.strength * token_loss(setup.model, ids)

    windows = setup.sources.windows("real")
    return _clipped(setup.base(), Term(key=f"replay {setup.method.strength}", loss=loss, inputs=(windows,)))


def _null(setup: _Setup) -> Training:
    """Train B alone, with A in the space that source inputs hardly use (the idea of LoRA-Null, arXiv 2503.02659)."""
    setup.model.start_in(setup.sources.used())
    return _clipped(setup.base(setup.model.lora_b))


def _defaults(setup: _Setup) -> Training:
    """GradGuide without a source."""
    return Training(optimizer=GradGuide(setup.base()))


def _structured(setup: _Setup) -> Training:
    """GradGuide with a structured source.

    Options: ``weight`` and ``floor`` of the pull; ``rank`` (a number or "whole"), ``rest`` of the spectrum ("diag",
    "mean", "none"), ``text`` ("real", "own") and ``tokens`` of the source; ``start`` of A ("random", or "null": in the
    space that source inputs hardly use, not frozen); ``direction`` and ``bound`` beside it ("on", "off").
    """
    options = setup.method.options
    if options["start"] == "null":
        setup.model.start_in(setup.sources.used())
    source = setup.sources.source(setup.method.spec, options["rest"], float(options["floor"]))
    off: dict[str, Any] = {"direction": None} if options["direction"] == "off" else {}
    if options["bound"] == "off":
        off["magnitude"] = Magnitude(max_update=None)
    alignment = Alignment(source, weight=float(options["weight"]))
    return Training(optimizer=GradGuide(setup.base(), alignment=alignment, names=setup.model.model, **off))


METHODS: dict[str, Callable[[_Setup], Training]] = {
    "clip": _clip, "quarter": _quarter, "l2sp": _l2sp, "kl": _kl, "replay": _replay, "null": _null,
    "defaults": _defaults, "structured": _structured,
}  # fmt: skip


def parse(text: str) -> Method:
    """Return the method that ``text`` describes.

    Raises:
        ValueError: there is no such method or option.
    """
    first, *rest = text.split()
    name, _, strength = first.partition(":")
    if name not in METHODS:
        raise ValueError(f"a method must be one of {', '.join(METHODS)}, found {name!r} in {text!r}")
    options = {**_COMMON, **(_STRUCTURED if name == "structured" else {})}
    for part in rest:
        key, _, value = part.partition("=")
        if key not in options or not value:
            raise ValueError(f"options of {name} are KEY=VALUE with {', '.join(options)}, found {part!r} in {text!r}")
        options[key] = value
    return Method(name=name, strength=float(strength or 1.0), options=options)


def needs(method: Method) -> frozenset[Spec | OwnText]:
    """Return the shared files that a method reads."""
    if method.name == "structured":
        return frozenset({method.spec, WHOLE} if method.options["start"] == "null" else {method.spec})
    files: dict[str, Spec | OwnText] = {"kl": OwnText(TOKENS), "null": WHOLE}
    return frozenset({files[method.name]} if method.name in files else ())


def set_up(method: Method, model: Language, sources: Sources, lr: float) -> Training:
    """Return the training of ``method``; it may move the adapter's start."""
    return METHODS[method.name](_Setup(model=model, sources=sources, lr=lr, method=method))


def _count(text: str) -> int:
    """Return a number such as 2k, which is 2048."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)
