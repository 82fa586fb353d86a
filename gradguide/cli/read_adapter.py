"""Read a LoRA adapter saved by PEFT, without the model it belongs to."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from gradguide.sources.structured.factors import Product
from gradguide.sources.structured.layers import base_name
from gradguide.utils.names import module_of

__all__ = ["Changes", "read_changes", "read_tensors"]

_FORMS = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "aLoRA",
    "use_bdlora": "BD-LoRA",
}
"""Entries of a configuration with which the change of the weight is not ``scale * B @ A`` for all inputs."""


def _adapter_file(path: str | os.PathLike[str]) -> Path:
    """Return the safetensors file of an adapter, given the file or the folder of PEFT's ``save_pretrained``.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    place = Path(path)
    if place.is_dir():
        place = place / "adapter_model.safetensors"
    if not place.is_file():
        raise FileNotFoundError(f"no adapter file at {os.fspath(place)!r}")
    return place


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of an adapter by their names in the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a readable safetensors file, or holds NaN or Inf.
    """
    place = _adapter_file(path)
    try:
        tensors: dict[str, Tensor] = load_file(place)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(place)!r} is not a readable safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{os.fspath(place)!r} holds NaN or Inf in {name}: the training that wrote it diverged")
    return tensors


class Changes(NamedTuple):
    """Changes of the base model by an adapter.

    Attributes:
        products: the change of each adapted layer's weight, ``scale * B`` [out, r] and A [r, in], by base layer name.
        others: names of modules that the file changes otherwise: trained copies, adapters of embeddings. Biases of B
            are left out.
        start: PEFT's ``init_lora_weights``.
    """

    products: dict[str, Product]
    others: list[str]
    start: str


def read_changes(path: str | os.PathLike[str]) -> Changes:
    """Return the changes of the base model by an adapter.

    The scale comes from ``adapter_config.json`` beside the file.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged, or the adapter is not plain LoRA.
    """
    tensors = read_tensors(path)
    config = _read_config(_adapter_file(path).with_name("adapter_config.json"))
    changes: dict[str, Product] = {}
    others: dict[str, None] = {}
    for key, a in tensors.items():
        name, found, rest = key.partition(".lora_A.")
        b = tensors.get(f"{name}.lora_B.{rest}")
        if not found:
            # PEFT also saves the unchanged weight of an adapted head or embedding.
            if ".lora_B." not in key and ".base_layer." not in key:
                others[base_name(module_of(key))] = None
            continue
        if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{os.fspath(path)!r} is damaged: {key} has no B matrix of its rank")
        layer = base_name(name)
        changes[layer] = _scale(config, layer, a.shape[0]) * b.float(), a.float()
    if not changes:
        raise ValueError(f"{os.fspath(path)!r} has no LoRA matrix of a linear layer")
    return Changes(changes, list(others), str(config.get("init_lora_weights")))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {os.fspath(path)!r}, which holds the adapter's scale: PEFT writes it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
        number = float(config["lora_alpha"]) if kind == "LORA" else 0.0
        patterns = config.get("alpha_pattern") or {}
        readable = math.isfinite(number) and all(math.isfinite(float(value)) for value in patterns.values())
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not the configuration of an adapter ({error!r})") from error
    which = next((name for key, name in _FORMS.items() if config.get(key) not in (None, False)), kind)
    if which != "LORA":
        raise ValueError(f"{os.fspath(path)!r} is of kind {which}: the drift is modelled for plain LoRA adapters")
    if not readable:
        raise ValueError(f"{os.fspath(path)!r} has a lora_alpha that is not finite")
    return dict(config)


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return the factor of ``B A``."""
    patterns = config.get("alpha_pattern") or {}
    found = next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer)), None)
    alpha = float(config["lora_alpha"] if found is None else found)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
