"""A source on disk: adapter, head and source gradient in one folder, all in safetensors and JSON; never pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradguide import SourceGradient
from gradguide.integrations.peft import lora_parameters

from .errors import OptionError
from .files import replacing_folder
from .model import Classifier, add_lora
from .source import HEAD

__all__ = ["load_source", "save_source"]

_ADAPTER = "adapter"
_WEIGHTS = "adapter/adapter_model.safetensors"
_HEAD = "head.safetensors"
_GRADIENT = "source-gradient.safetensors"


def save_source(folder: Path, model: Classifier, source: SourceGradient, labels: tuple[str, ...]) -> None:
    """Writes the adapter as PEFT does, the source head with its labels, and the source gradient."""
    encoder: Any = model.encoder
    with replacing_folder(folder) as partial:
        # The base's embeddings are not the adapter's; to look whether they changed, PEFT would ask the hub.
        encoder.save_pretrained(str(partial / _ADAPTER), save_embedding_layers=False)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in model.heads[HEAD].state_dict().items()}
        save_file(head, partial / _HEAD, metadata={"labels": json.dumps(labels)})
        source.save(partial / _GRADIENT)


def load_source(
    folder: Path, encoder: nn.Module, labels: tuple[str, ...], device: torch.device
) -> tuple[Classifier, SourceGradient]:
    """The model and the source gradient that ``save_source`` wrote to ``folder``.

    Args:
        encoder: the encoder that the adapter was trained on, without an adapter.
        labels: of the source task at hand, which must be those of the saved head.

    Raises:
        OptionError: a file is missing or damaged, or it belongs to another model or other labels.
    """
    for name in (f"{_ADAPTER}/adapter_config.json", _WEIGHTS, _HEAD, _GRADIENT):
        if not (folder / name).is_file():
            raise OptionError("source_adapter", f"must be a folder with {name}, found {str(folder)!r} without it")
    try:
        head, saved_labels = _read_head(folder / _HEAD)
        if saved_labels != labels:
            raise OptionError(
                "source_adapter",
                f"knows {len(saved_labels)} labels ({_some(saved_labels)}), but the source task has {len(labels)} "
                f"({_some(labels)}); use the same --data, --source and --target",
            )
        model = Classifier(_adapted(encoder, folder), head["weight"].shape[1]).to(device)
        model.add_head(HEAD, len(labels), seed=0)
        model.heads[HEAD].load_state_dict(head)
        source = SourceGradient.load(folder / _GRADIENT)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        problem = str(error).splitlines()[0]
        raise OptionError("source_adapter", f"{str(folder)!r} does not fit or is damaged: {problem}") from error
    if set(source.names()) != {name for name, _ in lora_parameters(model)}:
        raise OptionError("source_adapter", f"{str(folder)!r} holds a source gradient of other parameters")
    return model, source


def _read_head(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    with safe_open(path, framework="pt") as file:
        labels = json.loads(file.metadata()["labels"])
    return load_file(path), tuple(labels)


def _adapted(encoder: nn.Module, folder: Path) -> nn.Module:
    from peft import LoraConfig, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(folder / _ADAPTER))
    config.inference_mode = False  # as saved, it would freeze the adapter
    config.base_model_name_or_path = None  # PEFT fills in this model's; whether the adapter fits is checked below
    adapted = add_lora(encoder, config)
    # Not PeftModel.from_pretrained: that falls back to pickled weights.
    result = set_peft_model_state_dict(adapted, load_file(folder / _WEIGHTS))
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if "lora_" in name)]
    if wrong:
        raise ValueError(f"{len(wrong)} unexpected or missing weights, the first is {wrong[0]}")
    return adapted


def _some(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
