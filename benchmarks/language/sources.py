"""Files that runs share: structured sources of the model, and text that the model writes itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gradguide.sources.structured
from benchmarks.harness import digest_of
from benchmarks.language.data import WINDOW, Texts, answer_batches
from benchmarks.language.model import Language
from benchmarks.language.starts import corda_eigens, unused_directions
from gradguide import StructuredSource
from gradguide.integrations.sampling import own_text, sampled_loss
from gradguide.sources.structured.factors import Factor, LayerFactors
from gradguide.utils.atomic import atomic_write

__all__ = ["TOKENS", "Corda", "File", "OwnText", "Sources", "Spec", "Unused", "digest", "path_of"]

TOKENS = 20 * 1024
"""Default number of tokens of source text."""
_SHARE = 160  # one window of encyclopedia for this many tokens, and three answers for four windows
_BATCH = 8
_WRITING = 64  # sequences that the model writes at once
_CODE = [
    *sorted(Path(gradguide.sources.structured.__path__[0]).glob("*.py")),
    *(Path(inspect.getfile(part)) for part in (sampled_loss, corda_eigens, Texts)),
]
"""The code that makes the files."""


class OwnText(NamedTuple):
    """Text that the model writes itself."""

    tokens: int


class Spec(NamedTuple):
    """Specification of a structured source, without the model.

    text: "real" (encyclopedia and answered instructions) or "own".
    tokens: approximate number of tokens.
    rank: rank of the factors; None for whole ones.
    """

    text: str
    tokens: int
    rank: int | None

    @property
    def needs(self) -> frozenset[OwnText]:
        """The files that it is captured from."""
        return frozenset({OwnText(self.tokens)} if self.text == "own" else ())


class Corda(NamedTuple):
    """Directions of CorDA, see ``starts.corda_eigens``.

    method: tells it from other files, since tuples of equal values are equal.
    """

    tokens: int = TOKENS
    method: str = "corda"


class Unused(NamedTuple):
    """Directions that source inputs use least, see ``starts.unused_directions``."""

    tokens: int = TOKENS
    method: str = "unused"


File: TypeAlias = Spec | OwnText | Corda | Unused


def digest(model: str, data: Path, device: torch.device) -> str:
    """Return a digest of all that the files depend on: model, data, device type and the code that makes them."""
    return digest_of(model, [data / "wikitext2", data / "seed_tasks", *_CODE], device.type)


class Sources:
    """Makes and reads the shared files of one model.

    Args:
        cache: folder of the files.
        key: see :func:`digest`; part of the files' names.
    """

    def __init__(self, model: Language, texts: Texts, tokenizer: Any, cache: Path, key: str) -> None:
        self._model = model
        self._texts = texts
        self._tokenizer = tokenizer
        self._cache = cache
        self._key = key
        self._loaded: dict[object, Any] = {}

    def make(self, wanted: File) -> None:
        """Write the file, unless it is there."""
        path = path_of(wanted, self._cache, self._key)
        if path.exists():
            return
        self._model.reset(0)  # B is zero, so that the model is the base model
        if isinstance(wanted, OwnText):
            written = own_text(
                self._model.model, self._tokenizer, tokens=wanted.tokens, length=WINDOW, batch_size=_WRITING
            )
            with atomic_write(path) as temporary:
                save_file({"ids": torch.cat([batch["input_ids"] for batch in written]).cpu()}, temporary)
            return
        if isinstance(wanted, Unused):
            with atomic_write(path) as temporary:
                save_file(unused_directions(self._model, self.text()), temporary)
            return
        if isinstance(wanted, Corda):
            rows = [
                ids[mask.bool()]
                for batch in self.text()
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            with atomic_write(path) as temporary:
                save_file(corda_eigens(self._model, rows), temporary)
            return
        batches = list(self._batches(wanted))
        StructuredSource.capture(self._model.model, batches, sampled_loss, rank=wanted.rank).save(path)

    def windows(self, text: str) -> Tensor:
        """Return source text, "real" or "own", for losses: int64 [windows, 96] on the model's device."""
        if text == "real":
            found = self._texts.windows("capture", TOKENS // _SHARE)
        else:
            found = load_file(path_of(OwnText(TOKENS), self._cache, self._key))["ids"]
        return found.to(self._model.device)

    def source(self, spec: Spec, rest: str, floor: float) -> StructuredSource:
        """Return a source on the model's device.

        Args:
            rest: what is kept of the spectrum beyond the rank: "diag" (a diagonal), "mean" (a multiple of the
                identity) or "none".
        """
        if (spec, rest) not in self._loaded:
            held = StructuredSource.load(path_of(spec, self._cache, self._key))
            layers = {name: self._changed(factors, rest) for name, factors in held._layers.items()}
            self._loaded[spec, rest] = StructuredSource(layers, held.metadata)
        source: StructuredSource = copy.copy(self._loaded[spec, rest])
        source.floor = floor
        return source

    def unused(self) -> dict[str, Tensor]:
        """Return the directions that source inputs use least, by layer, see ``starts.unused_directions``."""
        return self._tensors(Unused())

    def text(self) -> list[dict[str, Tensor]]:
        """Return the source text of the default structured source, as batches for ``sampled_loss``."""
        return list(self._batches(Spec("real", TOKENS, None)))

    def corda(self) -> dict[str, Tensor]:
        """Return what ``starts.corda_eigens`` found."""
        return self._tensors(Corda())

    def _tensors(self, file: Unused | Corda) -> dict[str, Tensor]:
        if file not in self._loaded:
            found = load_file(path_of(file, self._cache, self._key))
            self._loaded[file] = {name: value.to(self._model.device) for name, value in found.items()}
        tensors: dict[str, Tensor] = self._loaded[file]
        return tensors

    def _batches(self, spec: Spec) -> Iterator[dict[str, Tensor]]:
        device = self._model.device
        if spec.text == "own":
            ids = load_file(path_of(OwnText(spec.tokens), self._cache, self._key))["ids"]
        else:
            ids = self._texts.windows("capture", max(1, spec.tokens // _SHARE))
        for part in ids.split(_BATCH):
            yield {"input_ids": part.to(device), "attention_mask": torch.ones_like(part).to(device)}
        if spec.text == "own":
            return
        pairs = self._texts.answers("capture", max(1, spec.tokens // _SHARE * 3 // 4))
        yield from answer_batches(pairs, _BATCH, device)

    def _changed(self, factors: LayerFactors, rest: str) -> LayerFactors:
        inputs, outputs = (_with_rest(f, rest).to(self._model.device) for f in (factors.inputs, factors.outputs))
        return LayerFactors(inputs, outputs, factors.scale, factors.anchor)


def path_of(wanted: File, cache: Path, key: str) -> Path:
    """Return the path of a shared file."""
    if isinstance(wanted, Corda | Unused):
        return cache / f"{wanted.method}-{key}-{wanted.tokens}.safetensors"
    if isinstance(wanted, OwnText):
        return cache / f"text-{key}-{wanted.tokens}.safetensors"
    return cache / f"source-{key}-{wanted.text}-{wanted.tokens}-{wanted.rank or 'whole'}.safetensors"


def _with_rest(factor: Factor, rest: str) -> Factor:
    if rest == "diag":
        return factor
    if rest == "none":
        return Factor(factor.basis, torch.zeros_like(factor.rest))
    return Factor(factor.basis, factor.rest.mean(-1, keepdim=True).expand_as(factor.rest).contiguous())
