"""Everything that the methods share: data, the source-adapted model, and the source gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradguide import SourceGradient
from gradguide.integrations.peft import lora_parameters

from .config import DemoConfig
from .data import Transfer, read_transfer
from .encoded import Encoded, encode
from .errors import check_extras
from .model import Classifier, accuracy, load_encoder
from .sampling import draw, few_shot
from .source import HEAD, freeze_source, learn_source
from .storage import load_source, save_source

__all__ = ["Prepared", "prepare"]

_SEED = 0
_TRAIN_ROWS_PER_LABEL = 32
_TEST_ROWS_PER_LABEL = 10


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """
    Args:
        config: the options that led here.
        transfer: the source and the target task.
        model: with the frozen source head; its adapter is trained further by each run.
        adapter: copies of the adapter's parameters after source training, by name: where each run starts.
        source: the source gradient at that point.
        shots: one k-shot training set per seed.
        target_test, source_test: rows that measure the accuracies.
        source_accuracy: of the model before any adaptation, in [0, 1].
    """

    config: DemoConfig
    transfer: Transfer
    model: Classifier
    adapter: dict[str, Tensor]
    source: SourceGradient
    shots: tuple[Encoded, ...]
    target_test: Encoded
    source_test: Encoded
    source_accuracy: float

    @property
    def source_test_is_sampled(self) -> bool:
        return len(self.source_test) < len(self.transfer.source.test)


def prepare(config: DemoConfig) -> Prepared:
    """Reads the data, then trains (or loads) the source adapter and captures (or loads) its gradient.

    Raises:
        DemoError: a package, a file, a model or an option is wrong.
    """
    check_extras()
    transfer = read_transfer(config.data, target=config.target, sources=config.source)
    known, aim = transfer.source, transfer.target
    chosen = [few_shot(aim, config.shots, seed) for seed in range(config.seeds)]
    encoder, tokenizer = load_encoder(config.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    if config.source_adapter is not None:
        model, source = load_source(config.source_adapter, encoder, known.labels, device)
        freeze_source(model)
    else:
        rows = encode(draw(known.train, _TRAIN_ROWS_PER_LABEL, _SEED), known.labels, tokenizer, device)
        model, source = learn_source(encoder, rows, len(known.labels), seed=_SEED)
    if config.save_source is not None:
        save_source(config.save_source, model, source, known.labels)
    source_test = encode(draw(known.test, _TEST_ROWS_PER_LABEL, _SEED), known.labels, tokenizer, device)
    return Prepared(
        config=config,
        transfer=transfer,
        model=model,
        adapter={name: parameter.detach().clone() for name, parameter in lora_parameters(model)},
        source=source,
        shots=tuple(encode(rows, aim.labels, tokenizer, device) for rows in chosen),
        target_test=encode(aim.test, aim.labels, tokenizer, device),
        source_test=source_test,
        source_accuracy=accuracy(model, HEAD, source_test),
    )
