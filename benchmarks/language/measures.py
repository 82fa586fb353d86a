"""Measure a trained adapter: accuracy and loss on the target, and drift from the base model on held-out source text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import synchronise
from benchmarks.language.data import Choices, Pair, Target, Texts, padded, with_labels
from benchmarks.language.model import Language, answer_loss, kl, states_at

__all__ = ["Drift", "Size", "Watch", "accuracy", "answers", "bytes_of"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Number of rows and texts that are measured.

    Args:
        rows: test rows of the target.
        windows, answers: windows of encyclopedia and answered instructions.
        batch: rows of a batch.
    """

    rows: int
    windows: int
    answers: int
    batch: int

    @staticmethod
    def of(device: torch.device) -> Size:
        """Return a size for a GPU, or a smaller one for a CPU."""
        if device.type == "cuda":
            return Size(rows=160, windows=40, answers=48, batch=320)
        return Size(rows=80, windows=12, answers=8, batch=16)


class Watch:
    """Adds up the seconds that are spent inside ``with watch``, the device's included."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun = 0.0

    def __enter__(self) -> Watch:
        synchronise()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        synchronise()
        self.seconds += time.perf_counter() - self._begun


class Drift:
    """KL from the base model, in nats per token. Create it while the model's adapter is zero."""

    def __init__(self, model: Language, texts: Texts, size: Size) -> None:
        self._model = model
        self._batch = size.batch
        self._windows = texts.windows("eval", size.windows).to(model.device)
        answers = padded(texts.answers("eval", size.answers))
        self._answers = answers.ids.to(model.device)
        # Positions of the flattened hidden states that predict an answer's token.
        rows = torch.arange(len(answers.ids))[:, None] * answers.ids.shape[1]
        self._places = (rows + answers.positions)[answers.targets != -100].to(model.device)
        self._start = self._hidden()

    def __call__(self) -> dict[str, float]:
        """Return ``drift``, on encyclopedia, and ``drift_answers``, on answered instructions."""
        with torch.no_grad():
            pairs = zip(self._hidden(), self._start, strict=True)
            found = torch.stack([kl(self._model, now, start) for now, start in pairs]).tolist()
        return dict(zip(("drift", "drift_answers"), found, strict=True))

    @torch.no_grad()
    def _hidden(self) -> tuple[Tensor, Tensor]:
        windows, answers = (
            torch.cat([self._model.hidden(part) for part in ids.split(self._batch)]).flatten(0, 1)
            for ids in (self._windows, self._answers)
        )
        return windows, answers[self._places]


@torch.no_grad()
def accuracy(model: Language, target: Target, size: Size) -> dict[str, float]:
    """Return ``target_accuracy``, in [0, 1], and ``target_loss``, the mean loss of the right label in nats.

    The chosen class is the one whose words have the highest mean log likelihood.
    """
    rows = target.test[: size.rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # rows of similar length share a batch
    width = target.choices_width if model.device.type == "cuda" else None
    words = torch.tensor([token for label in target.labels for token in label], device=model.device)
    lengths = torch.tensor([len(label) for label in target.labels])
    sums = torch.zeros(len(rows), len(lengths))
    for chosen in torch.tensor(order).split(size.batch // 4):
        prompts = [rows[row][0] for row in chosen.tolist()]
        choices = Choices(*(part.to(model.device) for part in with_labels(prompts, target.labels, width)))
        hidden = model.hidden(choices.ids, choices.segments)
        states = states_at(hidden, choices.positions)
        targets = words.expand(len(prompts), -1)
        losses = torch.nn.functional.cross_entropy(model.logits(states).mT, targets, reduction="none").cpu()
        sums[chosen] = torch.stack([part.sum(1) for part in losses.split(lengths.tolist(), dim=1)], dim=1)
    gold = torch.tensor([label for _, label in rows])
    return {
        "target_accuracy": float(((sums / lengths).argmin(1) == gold).float().mean()),
        "target_loss": float(sums.gather(1, gold[:, None]).mean()),
    }


@torch.no_grad()
def answers(model: Language, pairs: Sequence[Pair], size: Size) -> float:
    """Return the mean loss of the tokens of the answers, in nats."""
    total = torch.zeros((), device=model.device)
    count = 0
    rows = min(size.batch, 16)  # the logits of every token of long answers
    for first in range(0, len(pairs), rows):
        batch = padded(pairs[first : first + rows]).to(model.device)
        used = int((batch.targets != -100).sum())
        total += used * answer_loss(model, batch, "token")
        count += used
    return float(total) / count


def bytes_of(held: Any) -> int:
    """Return the bytes of all tensors in ``held``: containers and objects, however deep. Shared storage counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [held]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, Sequence) and not isinstance(part, str):
            waiting += part
        else:
            waiting += (vars(part) if hasattr(part, "__dict__") else {}).values()
            waiting += [getattr(part, name, None) for name in getattr(type(part), "__slots__", ())]
    return sum(storages.values())
