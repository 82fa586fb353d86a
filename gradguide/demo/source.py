"""The source task: train the adapter on it, capture its gradient, and save or load both.

A saved source is a folder of safetensors and JSON files; nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from gradguide import SourceGradient
from gradguide.demo.config import OptionError
from gradguide.demo.data import batches
from gradguide.demo.model import Batch, Classifier, Encoded, add_lora
from gradguide.integrations.peft import lora_parameters
from gradguide.utils.atomic import scratch_beside

__all__ = ["HEAD", "capture_source", "freeze_source", "learn_source", "load_source", "save_source"]

HEAD = "source"

_BATCH = 32
_EPOCHS = 3
_MIN_STEPS = 80  # small sets need more than three epochs
_LR = 1e-3
_HEAD_LR = 1e-2  # the head starts untrained; at the adapter's rate the adapter would compensate for it
_MAX_NORM = 1.0
_CAPTURE_BATCH = 8  # the Fisher information of a batch approximates that of its rows; small batches do so better

_ADAPTER = "adapter"
_WEIGHTS = "adapter/adapter_model.safetensors"
_HEAD_FILE = "head.safetensors"
_GRADIENT = "source-gradient.safetensors"


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
    freeze_source(model)
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


def freeze_source(model: Classifier) -> None:
    """Freeze the source head, so that the source accuracy depends on the adapter alone."""
    model.heads[HEAD].requires_grad_(False)


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

    def sampled_loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(head, batch)
        probabilities = logits.detach().softmax(dim=-1)
        sampled = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        return nn.functional.cross_entropy(logits, sampled)

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    extra = trainable - {name for name, _ in lora_parameters(model)}
    if extra:
        raise ValueError(f"only the adapter may be trainable at capture, found {', '.join(sorted(extra))}")
    model.eval()
    return SourceGradient.capture(model, list(rows.by_length(_CAPTURE_BATCH)), loss, curvature=sampled_loss)


def save_source(folder: Path, model: Classifier, source: SourceGradient, labels: tuple[str, ...]) -> None:
    """Write the adapter in PEFT's format, the source head with its labels, and the source gradient.

    ``folder`` must not exist or must be empty. It appears complete or not at all.
    """
    encoder: Any = model.encoder
    with _new_folder(folder) as partial:
        # With "auto", PEFT contacts the hub to check whether embeddings changed.
        encoder.save_pretrained(str(partial / _ADAPTER), save_embedding_layers=False)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in model.heads[HEAD].state_dict().items()}
        save_file(head, partial / _HEAD_FILE, metadata={"labels": json.dumps(labels)})
        source.save(partial / _GRADIENT)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` and rename it to ``path`` if the block succeeds."""
    with scratch_beside(path) as scratch:
        partial = scratch.folder / path.name  # the scratch folder itself is private to the user
        partial.mkdir()
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)


def load_source(
    folder: Path, encoder: nn.Module, labels: tuple[str, ...], device: torch.device
) -> tuple[Classifier, SourceGradient]:
    """Return the model and the source gradient that ``save_source`` wrote to ``folder``.

    Args:
        encoder: encoder that the adapter was trained on, without an adapter.
        labels: labels of the source task; they must equal those of the saved head.

    Raises:
        OptionError: a file is missing or damaged, or belongs to another model or other labels.
    """
    for name in (f"{_ADAPTER}/adapter_config.json", _WEIGHTS, _HEAD_FILE, _GRADIENT):
        if not (folder / name).is_file():
            raise OptionError("source_adapter", f"must be a folder with {name}, found {str(folder)!r} without it")
    try:
        head, saved_labels = _load_head(folder / _HEAD_FILE)
        if saved_labels != labels:
            raise OptionError(
                "source_adapter",
                f"has {len(saved_labels)} labels ({_shortened(saved_labels)}), but the source task has {len(labels)} "
                f"({_shortened(labels)}); use the same --data, --source and --target",
            )
        model = Classifier(_load_adapter(encoder, folder), head["weight"].shape[1]).to(device)
        model.add_head(HEAD, len(labels), seed=0)
        model.heads[HEAD].load_state_dict(head)
        source = SourceGradient.load(folder / _GRADIENT)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        problem = str(error).splitlines()[0]
        raise OptionError("source_adapter", f"{str(folder)!r} does not fit or is damaged: {problem}") from error
    if set(source.names()) != {name for name, _ in lora_parameters(model)}:
        raise OptionError("source_adapter", f"{str(folder)!r} holds a source gradient of other parameters")
    return model, source


def _load_head(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    with safe_open(path, framework="pt") as file:
        labels = json.loads(file.metadata()["labels"])
    return load_file(path), tuple(labels)


def _load_adapter(encoder: nn.Module, folder: Path) -> nn.Module:
    from peft import LoraConfig, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder / _ADAPTER))
    config.inference_mode = False  # saved as True, which would freeze the adapter
    config.base_model_name_or_path = None  # PEFT then fills in this encoder's name; the weights are compared below
    adapted = add_lora(encoder, config)
    # PeftModel.from_pretrained is not used, because it can fall back to pickled weights.
    result = set_peft_model_state_dict(adapted, load_file(folder / _WEIGHTS))
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if "lora_" in name)]
    if wrong:
        raise ValueError(f"{len(wrong)} unexpected or missing weights, the first is {wrong[0]}")
    return adapted


def _shortened(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
