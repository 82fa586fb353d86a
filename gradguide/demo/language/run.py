"""The demo on a causal language model from start to end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from gradguide import Alignment, GradGuide, StructuredSource
from gradguide.demo.compare import now, trainable
from gradguide.demo.config import LanguageConfig, OptionError, check_extras, check_source_file, make_out
from gradguide.demo.data import batches, draw, few_shot, read_transfer
from gradguide.demo.language.model import Batch, Rows, accuracy, encode, load_model
from gradguide.demo.model import add_lora
from gradguide.integrations.drift import drift
from gradguide.integrations.sampling import own_text, sampled_loss

__all__ = ["LanguageConfig", "Outcome", "run"]

_SOURCE_TOKENS = 4096
_HELD_TOKENS = 1024
_LENGTH = 64
_WRITING = 32  # sequences that the model writes at once
_TEST_ROWS_PER_LABEL = 6
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one run.

    Args:
        target_accuracy: after the last step, in [0, 1].
        drift: KL from the base model on text that it wrote itself, in nats per token.
        seconds_per_step: median time of forward, backward and optimizer step.
    """

    method: str
    seed: int
    target_accuracy: float
    drift: float
    seconds_per_step: float


def run(config: LanguageConfig) -> list[Outcome]:
    """Adapt with clipping and AdamW, and with GradGuide; write the results and print the table.

    Raises:
        DemoError: a package, a file, a model or an option is wrong, or the results or the source cannot be written.
    """
    from gradguide.demo.language.report import print_table, write_report

    make_out(config.out)
    check_source_file(config.source_file)
    check_extras()
    task = read_transfer(config.data, target=config.target).target
    shots = [few_shot(task, config.shots, seed) for seed in range(config.seeds)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, tokenizer = load_model(config.model, device)
    rows = [encode(each, task.labels, tokenizer, device) for each in shots]
    test = encode(draw(task.test, _TEST_ROWS_PER_LABEL, _SEED), task.labels, tokenizer, device)
    _print_estimate(config, base, rows[0], test)
    source = _source(config, base, tokenizer)
    held = own_text(base, tokenizer, tokens=_HELD_TOKENS, seed=1, length=_LENGTH, batch_size=_WRITING)
    model = add_lora(base)
    before = accuracy(model, test)
    outcomes = []
    with tqdm(total=len(_METHODS) * config.seeds * config.steps, desc="adapt", unit="step", disable=None) as bar:
        for seed in range(config.seeds):
            for name in _METHODS:
                seconds = _train(config, name, model, source, rows[seed], seed, bar)
                outcomes.append(
                    Outcome(
                        method=name,
                        seed=seed,
                        target_accuracy=accuracy(model, test),
                        drift=drift(model, held),
                        seconds_per_step=statistics.median(seconds),
                    )
                )
    paths = write_report(config, task, outcomes, before, device)
    print_table(config, task, outcomes, before)
    for path in paths:
        print(f"wrote {path}")
    return outcomes


def _source(config: LanguageConfig, model: Any, tokenizer: Any) -> StructuredSource:
    path = config.source_file
    if path is not None and path.exists():
        try:
            return StructuredSource.load(path)
        except (OSError, ValueError) as error:
            raise OptionError("source_file", f"cannot be loaded: {error}") from error
    text = own_text(model, tokenizer, tokens=_SOURCE_TOKENS, length=_LENGTH, batch_size=_WRITING)
    parts = [{name: value[i : i + 8] for name, value in batch.items()} for batch in text for i in range(0, _WRITING, 8)]
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        source = StructuredSource.capture(model, [part for part in parts if len(part["input_ids"])], sampled_loss)
    if path is not None:
        source.save(path)
    return source


def _plain(config: LanguageConfig, model: Any, source: StructuredSource) -> Optimizer:
    parameters = trainable(model)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)

    optimizer = AdamW(parameters, lr=config.lr)
    optimizer.register_step_pre_hook(clip)
    return optimizer


def _guided(config: LanguageConfig, model: Any, source: StructuredSource) -> Optimizer:
    return GradGuide(AdamW(trainable(model), lr=config.lr), alignment=Alignment(source), names=model)


_METHODS: dict[str, Callable[[LanguageConfig, Any, StructuredSource], Optimizer]] = {
    "clip + AdamW": _plain,
    "GradGuide": _guided,
}


def _train(
    config: LanguageConfig, name: str, model: Any, source: StructuredSource, rows: Rows, seed: int, bar: tqdm[None]
) -> list[float]:
    """Train the adapter from its start and return the seconds of each step."""
    _restart(model, seed)
    try:
        optimizer = _METHODS[name](config, model, source)
    except ValueError as error:
        raise OptionError("source_file", f"does not fit: {error}") from error
    seconds = []
    for chosen in islice(batches(len(rows), config.batch, seed), config.steps):
        begun = now(rows.device)
        _loss(model, rows.batch(chosen)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(rows.device) - begun)
        bar.update()
    return seconds


def _restart(model: Any, seed: int) -> None:
    """Draw A from ``seed`` as PEFT draws it, and set B to zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", True)


def _loss(model: Any, batch: Batch) -> Any:
    return model(**batch, use_cache=False).loss


def _print_estimate(config: LanguageConfig, model: Any, rows: Rows, test: Rows) -> None:
    """Time one forward pass and print how long the demo takes."""
    batch = rows.batch(range(min(config.batch, len(rows))))
    with torch.inference_mode():
        _loss(model, batch)  # the first pass allocates memory
        begun = now(rows.device)
        _loss(model, batch)
        forward = now(rows.device) - begun
    per_token = forward / batch["input_ids"].numel()
    runs = len(_METHODS) * config.seeds
    tested = sum(each["input_ids"].numel() for each in test.candidates())
    # A step is about 3.5 forward passes. Text is written token by token, in batches.
    writing = (_SOURCE_TOKENS + _HELD_TOKENS) / _WRITING * max(forward / 2, 8 * per_token)
    capture = 0.0 if config.source_file is not None and config.source_file.exists() else 4.5 * _SOURCE_TOKENS
    tokens = capture + (runs + 1) * tested + runs * 2 * _HELD_TOKENS
    seconds = writing + tokens * per_token + runs * config.steps * 3.5 * forward
    print(f"about {math.ceil(seconds / 60)} min on this {rows.device.type} device", flush=True)
