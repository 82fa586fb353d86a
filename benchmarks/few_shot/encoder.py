"""Problems on an encoder with a LoRA adapter on all its linear layers: source tasks, targets, sequences."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.few_shot.data import HEAD_LR, SOURCES, Episode, Problem, source_task
from benchmarks.harness import digest_of
from gradguide import SourceGradient, StructuredSource
from gradguide.demo.data import Example, batches, draw
from gradguide.demo.model import Classifier, Encoded, accuracy, add_lora, encode, load_encoder
from gradguide.demo.source import HEAD, learn_source, sampled_label_loss
from gradguide.integrations.peft import lora_parameters
from gradguide.utils.atomic import atomic_write

__all__ = ["Earlier", "Encoder", "LiveRows"]

_SEED = 0
_MAX_TOKENS = 40  # cuts medical abstracts to their beginning; most other texts are shorter
_TRAIN_ROWS_PER_LABEL = 32
_TEST_ROWS = 100
_LIVE_BATCH = 8
_TARGET = "target"


@dataclass(frozen=True, kw_only=True)
class LiveRows:
    """Head and rows of an earlier task, for methods that use source data at every step."""

    head: str
    rows: Encoded


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The tasks trained before the target: stored sources, their rows, and accuracies on them."""

    sources: Sequence[SourceGradient]
    live: Sequence[LiveRows]
    accuracies: Callable[[], dict[str, float]]


class Encoder:
    """A pretrained encoder with an adapter that was trained on a source task, or with a new adapter.

    Args:
        model: hub id or folder.
        data: folder of the text sets.
        source: name of the source task; None for a new adapter.
        cache: folder of trained source adapters and their sources, by model and data; what is missing is made and saved
            there.
    """

    def __init__(self, model: str, data: Path, source: str | None, cache: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder: Any
        encoder, self._tokenizer = load_encoder(model)
        encoder.to(self.device)
        self.source_accuracy = float("nan")
        self.earlier = Earlier(sources=(), live=(), accuracies=dict)
        if source is None:
            self.model = Classifier(add_lora(encoder, seed=_SEED), encoder.config.hidden_size).to(self.device)
        else:
            folder = cache / f"{source}-{digest_of(model, [data / SOURCES[source]])}"
            self._learn(encoder, data, source, folder)
        self._start = {name: p.detach().clone() for name, p in lora_parameters(self.model)}

    def encode(self, rows: Sequence[Example], labels: Sequence[str]) -> Encoded:
        """Return ``rows`` as tokens and class numbers."""
        return encode(rows, labels, self._tokenizer, self.device, max_tokens=_MAX_TOKENS)

    def reset(self) -> None:
        """Restore the adapter to its state after the source task, and remove all heads but the source's."""
        self._set(self._start)
        for _, parameter in lora_parameters(self.model):
            parameter.grad = None
        for head in set(self.model.heads) - {HEAD}:
            del self.model.heads[head]

    def problem(
        self,
        episode: Episode,
        seed: int,
        *,
        earlier: Earlier | None = None,
        head: str = _TARGET,
        rows: Sequence[Example] | None = None,
        head_lr: float | None = HEAD_LR,
        corrupt: Callable[[int, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Problem:
        """Return the episode as a problem, from the adapter's present state, with a new head.

        Args:
            episode: classes and rows.
            seed: of the head and of the order of live rows.
            earlier: the earlier tasks; by default the source task.
            head: name of the new head.
            rows: training rows in place of the episode's.
            head_lr: learning rate of the head; None for the adapter's.
            corrupt: returns the batch to use, from the number of the call of the loss and the batch.
        """
        earlier = self.earlier if earlier is None else earlier
        model, labels = self.model, episode.task.labels
        model.add_head(head, len(labels), seed)
        model.train()
        train = self.encode(episode.train if rows is None else rows, labels)
        pool, probe, test = (self.encode(r, labels) for r in (episode.pool, episode.probe, episode.task.test))
        calls = count()

        def loss(chosen: Sequence[int]) -> Tensor:
            batch = train.batch(chosen)
            return model.loss(head, batch if corrupt is None else corrupt(next(calls), batch))

        def pool_loss() -> Iterable[tuple[int, Tensor]]:
            model.eval()
            for batch in pool.by_length(16):
                yield len(batch["labels"]), model.loss(head, batch)
            model.train()

        return Problem(
            adapter=lora_parameters(model),
            head=list(model.heads[head].parameters()),
            head_lr=head_lr,
            rows=len(train),
            classes=len(labels),
            loss=loss,
            source_loss=[_live_loss(model, live, seed) for live in earlier.live],
            sources=earlier.sources,
            pool_loss=pool_loss,
            accuracy=lambda: {"target": accuracy(model, head, test), **earlier.accuracies()},
            probe=lambda: accuracy(model, head, probe),
            structured=None if earlier is not self.earlier else lambda: (self._structured, self.model.encoder),
        )

    @cached_property
    def _structured(self) -> StructuredSource:
        """The structured source of the source task. It is captured on first use, at the adapter's start."""
        now = {name: p.detach().clone() for name, p in lora_parameters(self.model)}
        self._set(self._start)
        source = capture_structured(self.model, self.earlier.live[0].rows, seed=_SEED)
        self._set(now)
        return source

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in lora_parameters(self.model):
            parameter.copy_(values[name])

    def _learn(self, encoder: Any, data: Path, source: str, folder: Path) -> None:
        task = source_task(data, source)
        rows = self.encode(draw(task.train, _TRAIN_ROWS_PER_LABEL, _SEED), task.labels)
        weights, tables = folder / "trained.safetensors", folder / "source.safetensors"
        if weights.exists():
            self.model = Classifier(add_lora(encoder, seed=_SEED), encoder.config.hidden_size).to(self.device)
            self.model.add_head(HEAD, len(task.labels), _SEED)
            self.model.load_state_dict(load_file(weights, str(self.device)), strict=False)
            self.model.heads[HEAD].requires_grad_(False)
            gradient = SourceGradient.load(tables)
        else:
            self.model, gradient = learn_source(encoder, rows, len(task.labels), seed=_SEED)
            gradient.save(tables)
            trained = dict(lora_parameters(self.model)) | dict(self.model.heads.named_parameters(prefix="heads"))
            with atomic_write(weights) as partial:  # last, since it says that both are there
                save_file({name: p.detach().contiguous() for name, p in trained.items()}, partial)
        per_label = max(1, round(_TEST_ROWS / len(task.labels)))
        test = self.encode(draw(task.test, per_label, _SEED), task.labels)
        self.earlier = Earlier(
            sources=(gradient,),
            live=(LiveRows(head=HEAD, rows=rows),),
            accuracies=lambda: {"source": accuracy(self.model, HEAD, test)},
        )
        self.source_accuracy = accuracy(self.model, HEAD, test)


def capture_structured(model: Classifier, rows: Encoded, *, seed: int) -> StructuredSource:
    """Return the structured source of the source task, with labels drawn from the model."""
    generator = torch.Generator(rows.device).manual_seed(seed)

    def sampled(_: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return sampled_label_loss(model, HEAD, batch, generator)

    # The encoder, not the classifier: its arguments have the attention mask.
    return StructuredSource.capture(model.encoder, list(rows.by_length(_LIVE_BATCH)), sampled)


def _live_loss(model: Classifier, live: LiveRows, seed: int) -> Callable[[], Tensor]:
    stream: Iterator[list[int]] = batches(len(live.rows), _LIVE_BATCH, random.Random(f"live/{seed}").randrange(2**31))
    return lambda: model.loss(live.head, live.rows.batch(next(stream)))
