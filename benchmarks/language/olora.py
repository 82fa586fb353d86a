"""O-LoRA (arXiv 2310.14152): one adapter per task. Those of finished tasks are frozen and stay active."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.language.fisher import factors, groups
from benchmarks.language.model import Language, grads
from benchmarks.language.training import Method, Setup, Training

__all__ = ["SLOTS", "Finished", "freeze", "olora"]

SLOTS = 4
"""Finished tasks that there is room for. All are one frozen adapter, so that one graph serves every task."""
_NAME = "finished"


class Finished:
    """The adapters of finished tasks: one frozen adapter of rank SLOTS * r beside the trained one."""

    def __init__(self, model: Language) -> None:
        self.used = 0
        self._model = model
        _make(model)
        for _, layer in model.layers():
            layer.lora_B[_NAME].weight.data.zero_()
            _activate(layer, ["default", _NAME])
        model.variant = _NAME
        model.until_reset(self._leave)

    @torch.no_grad()
    def add(self) -> None:
        """Freeze the trained adapter, and draw another one. The model stays what it is."""
        if self.used == SLOTS:
            raise ValueError(f"there is room for {SLOTS} finished tasks")
        for _, layer in self._model.layers():
            a, b = self._model.factors(layer)
            slot = slice(self.used * len(a), (self.used + 1) * len(a))
            layer.lora_A[_NAME].weight.data[slot] = a
            layer.lora_B[_NAME].weight.data[:, slot] = b
        self.used += 1
        self._model.draw(torch.initial_seed() + self.used)

    def frozen_a(self, layers: list[Any]) -> Tensor:
        """Return A of the finished tasks for a group of layers: [layers, used * r, in]."""
        rank = len(self._model.factors(layers[0])[0])
        return torch.stack([layer.lora_A[_NAME].weight.data[: self.used * rank] for layer in layers])

    def _leave(self) -> None:
        self._model.variant = ""
        for _, layer in self._model.layers():
            _activate(layer, ["default"])


def olora(setup: Setup) -> Training:
    """Penalise overlap of A with those of finished tasks: ``strength * sum of squares of A_k A^T``, then clip."""
    model, finished = setup.model, setup.kept
    if not finished:
        return setup.clipped()
    grouped = groups(model)
    held = [finished[-1].frozen_a(layers) for layers in grouped]

    def pull() -> None:
        for layers, before in zip(grouped, held, strict=True):
            a, _ = factors(model, layers)
            stacked = torch.stack(a)
            pulls = torch.bmm(torch.bmm(stacked, before.mT), before)
            torch._foreach_add_(grads(a), list(pulls), alpha=2 * setup.method.strength)

    return setup.clipped(pull, held=held)


def freeze(model: Language, batches: Any, method: Method, kept: Sequence[Finished]) -> list[Finished]:
    """Freeze the adapter of a finished task."""
    finished = kept[-1] if kept else Finished(model)
    finished.add()
    return [finished]


def _make(model: Language) -> None:
    """Add the frozen adapter, unless the model has it. Graphs refer to its storage, so it stays."""
    from peft import LoraConfig

    config = model.model.peft_config
    if _NAME in config:
        return
    first = config["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.model.add_adapter(
            _NAME,
            LoraConfig(
                r=SLOTS * first.r, lora_alpha=SLOTS * first.lora_alpha, lora_dropout=0.0,
                target_modules=first.target_modules,
            ),
        )  # fmt: skip
    model.model.eval()


def _activate(layer: Any, names: list[str]) -> None:
    layer.set_adapter(names)
    for part in (layer.lora_A, layer.lora_B):
        part[_NAME].weight.requires_grad_(False)
        part["default"].weight.requires_grad_(True)
