"""The source task: training the adapter on it, and capturing its gradient where that training ended."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradguide import SourceGradient
from gradguide.integrations.peft import lora_parameters

from .encoded import Batch, Encoded
from .model import Classifier, add_lora
from .sampling import batches

__all__ = ["HEAD", "capture_source", "freeze_source", "learn_source"]

HEAD = "source"

_BATCH = 32
_EPOCHS = 3
_LEAST_STEPS = 80  # small sets need more than three passes
_LR = 1e-3
_HEAD_LR = (
    1e-2  # the head starts from nothing; at the adapter's rate it would lag behind and the adapter make up for it
)
_MAX_NORM = 1.0

# The Fisher information of a batch stands for that of its rows, the better the smaller the batch.
_CAPTURE_BATCH = 8


def learn_source(encoder: Any, rows: Encoded, labels: int, *, seed: int) -> tuple[Classifier, SourceGradient]:
    """An encoder with an adapter and a frozen head that know the source task, and its gradient where they ended.

    Args:
        encoder: without an adapter.
        rows: the task's training rows, on the device that all of it is to be on.
        labels: how many the task has.
        seed: of adapter, head, order and drawn labels.
    """
    model = Classifier(add_lora(encoder, seed=seed), encoder.config.hidden_size).to(rows.device)
    model.add_head(HEAD, labels, seed)
    _train(model, rows, seed=seed)
    freeze_source(model)
    return model, capture_source(model, rows, seed=seed)


def _train(model: Classifier, rows: Encoded, *, seed: int) -> None:
    """Trains adapter and source head on ``rows`` with AdamW, clipped gradients and a linear decay of the rate."""
    steps = max(_EPOCHS * math.ceil(len(rows) / _BATCH), _LEAST_STEPS)
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


def freeze_source(model: Classifier) -> None:
    """Keeps the source head as it is from here on, so that only the adapter decides what is kept of the source."""
    model.heads[HEAD].requires_grad_(False)


def capture_source(model: Classifier, rows: Encoded, *, seed: int, head: str = HEAD) -> SourceGradient:
    """The gradient and the true Fisher information of a task's loss, for the parameters of the adapter.

    Args:
        model: with the task's head frozen and no other trainable parameters than the adapter's.
        rows: the task's rows; all are used, in small batches.
        seed: of the labels drawn from the model.
        head: of the task.
    """
    generator = torch.Generator(rows.device).manual_seed(seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(head, batch), batch["labels"])

    def sampled_loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(head, batch)
        probabilities = logits.detach().softmax(dim=-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        return nn.functional.cross_entropy(logits, drawn)

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    extra = trainable - {name for name, _ in lora_parameters(model)}
    if extra:
        raise ValueError(f"only the adapter may be trainable at capture, found {', '.join(sorted(extra))}")
    model.eval()
    return SourceGradient.capture(model, list(rows.by_length(_CAPTURE_BATCH)), loss, curvature=sampled_loss)
