"""Compare options between ranks, and report differences."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_agreement", "describe", "is_plain"]

MAX_SHOWN = 5
MAX_RANKS_SHOWN = 4
MAX_LENGTH = 80
_PLAIN = (bool, int, float, str, type(None))


def describe(label: str, value: object) -> dict[str, str]:
    """Return ``value`` as text by label. For a dataclass, return each constructor field under ``label.field``.

    New fields of a dataclass are compared without a change here.
    """
    if not is_dataclass(value) or hasattr(value, "fingerprint"):
        return {label: _text(value)}
    found = {label: type(value).__name__}
    for field in fields(value):
        if field.init:
            found.update(describe(f"{label}.{field.name}", getattr(value, field.name)))
    return found


def is_plain(value: object) -> bool:
    """Return whether the repr of ``value`` is the same in every process: numbers, strings, and sequences of them."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN) or (isinstance(value, Tensor) and value.dim() == 0)


def check_agreement(described: Mapping[str, str], groups: Sequence[Any], device: torch.device) -> None:
    """Raise on every rank unless all ranks have the same ``described``.

    If they do, the cost is one all-reduce of two numbers per group.

    Args:
        described: text by label, which must be the same on all ranks.
        groups: process groups that together connect all ranks to be compared.
        device: device of the tensors in collectives.

    Raises:
        ValueError: the ranks differ; the message lists labels and values that differ.
    """
    digest = hashlib.sha256(repr(list(described.items())).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    extremes = torch.tensor([number, -number], device=device)
    for group in groups:
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if extremes.tolist() != [number, -number]:
        raise ValueError(
            f"the ranks differ in {_differences(_gather(described, groups, device))}. Parameters, options and sources "
            "must be the same on all ranks: build model, optimizer and GradGuide alike, and capture a source on all "
            "ranks together or load one file on all. Nothing was changed"
        )


def _gather(described: Mapping[str, str], groups: Sequence[Any], device: torch.device) -> dict[int, dict[str, str]]:
    """Return ``described`` of each rank, by rank."""
    found = {dist.get_rank(): dict(described)}
    # NCCL sends objects through the current CUDA device.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for group in groups:
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = {rank: entries for part in parts for rank, entries in part.items()}
    return dict(sorted(found.items()))


def _differences(found: Mapping[int, Mapping[str, str]]) -> str:
    """Return the labels that differ, with the ranks of each value."""
    labels = dict.fromkeys(label for entries in found.values() for label in entries)
    odd = [label for label in labels if len({entries.get(label) for entries in found.values()}) > 1]
    if not odd:  # the same entries in another order
        return "the order of their options"
    shown = [f"{label}: {_by_value(label, found)}" for label in islice(odd, MAX_SHOWN)]
    more = f"; and {len(odd) - MAX_SHOWN} more" if len(odd) > MAX_SHOWN else ""
    return "; ".join(shown) + more


def _by_value(label: str, found: Mapping[int, Mapping[str, str]]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, entries in found.items():
        ranks.setdefault(entries.get(label, "absent"), []).append(rank)
    return ", ".join(f"{_short(value)} on {_ranks(those)}" for value, those in ranks.items())


def _ranks(those: Sequence[int]) -> str:
    listed = ", ".join(map(str, those[:MAX_RANKS_SHOWN]))
    more = f" and {len(those) - MAX_RANKS_SHOWN} more" if len(those) > MAX_RANKS_SHOWN else ""
    return f"rank {listed}" if len(those) == 1 else f"ranks {listed}{more}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}..."


def _text(value: object) -> str:
    """Return text that is equal on two ranks if the values are. For objects without a stable repr it is the type."""
    fingerprint = getattr(value, "fingerprint", None)  # a source
    if callable(fingerprint):
        return f"{type(value).__name__} {fingerprint()}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Tensor):
        return repr(value.tolist())
    # The repr of any other object may hold its address.
    return repr(value) if is_plain(value) else type(value).__name__
