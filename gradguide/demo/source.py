"""The source task: train the adapter on it, and capture its gradient."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradguide import SourceGradient
from gradguide.demo.data import batches
from gradguide.demo.model import Batch, Classifier, Encoded, add_lora
from gradguide.integrations.peft import lora_parameters

__all__ = ["HEAD", "capture_source", "learn_source", "sampled_label_loss"]

HEAD = "source"

_BATCH = 32
_EPOCHS = 3
_MIN_STEPS = 80  # small sets need more than three epochs
_LR = 1e-3
_HEAD_LR = 1e-2  # the head starts untrained; at the adapter's rate the adapter would compensate for it
_MAX_NORM = 1.0
_CAPTURE_BATCH = 8  # the Fisher information of a batch approximates that of its rows; small batches do so better


def learn_source(encoder: Any, rows: Encoded, labels: int, *, seed: int) -> tuple[Classifier, SourceGradient]:
    """Train an adapter and a head on the source task; return the model, with the head frozen, and its source gradient.

    Args:
        encoder: encoder without an adapter.
        rows: training rows of the task; the model is moved to their device.
        labels: number of labels of the task.
        seed: seed of adapter, head, row order and sampled labels.
    """
    model = Classifier(add_lora(encoder, seed=seed), encoder.config.hidden_size).to(rows.device)
    model.add_head(HEAD, labels, seed)
    _train(model, rows, seed=seed)
    model.heads[HEAD].requires_grad_(False)  # so that the source accuracy depends on the adapter alone
    return model, capture_source(model, rows, seed=seed)


def _train(model: Classifier, rows: Encoded, *, seed: int) -> None:
    """Train adapter and source head with AdamW, gradient clipping and a linear decay of the learning rate."""
    steps = max(_EPOCHS * math.ceil(len(rows) / _BATCH), _MIN_STEPS)
    adapter = [parameter for _, parameter in lora_parameters(model)]
    head = list(model.heads[HEAD].parameters())
    groups: list[dict[str, Any]] = [{"params": adapter}, {"params": head, "lr": _HEAD_LR}]
    optimizer = torch.optim.AdamW(groups, lr=_LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    model.train()
    with torch.random.fork_rng(), tqdm(total=steps, desc="train source adapter", unit="step", disable=None) as bar:
        torch.manual_seed(seed)
        for chosen in islice(batches(len(rows), _BATCH, seed), steps):
            optimizer.zero_grad()
            model.loss(HEAD, rows.batch(chosen)).backward()
            nn.utils.clip_grad_norm_([*adapter, *head], _MAX_NORM)
            optimizer.step()
            schedule.step()
            bar.update()


def sampled_label_loss(model: Classifier, head: str, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return the mean cross-entropy of a batch with labels drawn from the model, a scalar."""
    logits: Tensor = model(head, batch)
    probabilities = logits.detach().softmax(dim=-1)
    sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return nn.functional.cross_entropy(logits, sampled)


def capture_source(model: Classifier, rows: Encoded, *, seed: int, head: str = HEAD) -> SourceGradient:
    """Return the gradient and the true Fisher information of a task's loss with respect to the adapter.

    Args:
        model: model in which only the adapter is trainable.
        rows: rows of the task; all are used, in small batches.
        seed: seed of the labels that are sampled from the model.
        head: head of the task.

    Raises:
        ValueError: a parameter outside the adapter is trainable.
    """
    generator = torch.Generator(rows.device).manual_seed(seed)

    def loss(_: nn.Module, batch: Batch) -> Tensor:
        return model.loss(head, batch)

    def sampled_loss(_: nn.Module, batch: Batch) -> Tensor:
        return sampled_label_loss(model, head, batch, generator)

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    extra = trainable - {name for name, _ in lora_parameters(model)}
    if extra:
        raise ValueError(f"only the adapter may be trainable at capture, found {', '.join(sorted(extra))}")
    model.eval()
    return SourceGradient.capture(model, list(rows.by_length(_CAPTURE_BATCH)), loss, curvature=sampled_loss)
