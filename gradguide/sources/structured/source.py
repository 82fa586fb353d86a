"""Provide a source in weight space: the Kronecker-factored curvature of the linear layers of a base model."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import Layout
from gradguide.ops.row import Row
from gradguide.sources.loss_value import Loss
from gradguide.sources.metadata import check_metadata
from gradguide.sources.protocol import row_or_zeros
from gradguide.sources.structured import storage
from gradguide.sources.structured.binding import Binding
from gradguide.sources.structured.capture import capture_statistics
from gradguide.sources.structured.captured_weight import count_differences, sample_of
from gradguide.sources.structured.factors import LayerFactors, check_factors, merged, weighted_sum
from gradguide.sources.structured.layers import anchor_of, find_layers, select

__all__ = ["StructuredSource"]

DEFAULT_WEIGHT = 100.0
"""A hundredth of a nat of drift per token weighs as much as a nat of training loss. Of 3, 10, 30 and 100 it had the
highest accuracy and the least drift on SmolLM2-135M, at rates from 3e-4 to 1e-2 (``benchmarks/language/NOTES.md``)."""
FLOOR = 0.1


class StructuredSource:
    """The curvature of a language model on its source data, per linear layer, in weight space.

    A linear layer computes ``W x``, and training changes W by D: ``scale * B A`` for a LoRA adapter. The
    Kullback-Leibler divergence from the captured model is about ``1/2 sum tr(D^T G D S)`` nats per token, over layers
    and two pairs of S and G per layer. S is a covariance of the layer's inputs, G one of the gradients of log p at its
    outputs (Kronecker-factored curvature, arXiv 1503.05671; for continual learning, arXiv 1805.07810). The first pair
    is of tokens, the second of whole sequences (arXiv 2311.00636), because a change of a layer acts on all tokens of a
    sequence at once. The source returns the gradient of that KL with respect to A and B, or W. It depends on D alone,
    so one file serves every plain LoRA or rsLoRA adapter of a base model. Other parameters have no pull, such as
    embeddings, norms, and experts that are stored as one tensor: GradGuide warns of adapters on them.

    Create it with :meth:`capture` or :meth:`load`. Pass it to :class:`gradguide.Alignment`, and the model to ``names``.
    """

    def __init__(self, layers: Mapping[str, LayerFactors], metadata: Mapping[str, Any] | None = None) -> None:
        """Create a source from factors by layer name.

        Raises:
            ValueError: there is no layer, a factor is not finite or of another shape, or a diagonal is negative.
                Metadata has other types than the library writes.
        """
        if not layers:
            raise ValueError("a structured source needs at least one layer, found none")
        for name, factors in layers.items():
            check_factors(name, factors)
        self._layers = dict(layers)
        self.metadata: dict[str, Any] = dict(metadata or {})
        check_metadata(self.metadata)
        self.floor = FLOOR
        """Added to G's diagonal, over E|y|^2 of the outputs y. For experiments: files and merges have the default."""
        self.drift: Tensor | None = None
        """Modelled KL at the last step, in nats per token, Tensor []; only of the copy that an optimizer bound."""
        self._binding: Binding | None = None
        self._rows: dict[str, Tensor] = {}

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss,
        *,
        modules: str | Sequence[str] | None = None,
        rank: int | None = 64,
        dtype: torch.dtype | None = None,
    ) -> StructuredSource:
        """Capture the factors in one pass over source batches.

        The model runs in eval mode. Its modes, gradients, parameters, buffers and torch's random state do not change.
        Memory in addition to the model: ``(2 rank + 66) (in + out)`` float32 elements per layer, one pass of a batch,
        and the layers' inputs in it. Gradient checkpointing stays on. If it is reentrant, only the inputs in one
        checkpointed layer are kept at a time. Under ``torch.distributed``, every rank supplies its share of the batches
        (of any number without FSDP), and all ranks get the same source.
        Each sum of a layer is one all-reduce, after the last batch. If one rank fails, all raise, except under FSDP.

        The first dimension of a layer's input counts the sequences, or the input has the tokens of the model's
        ``input_ids``, flattened. Rows of other 2-d inputs, such as those of an expert, count as sequences of one token.

        Args:
            model: a base model or a PEFT model, trained or not.
            batches: source batches, in the form that ``loss`` expects. Their texts have to start as those in use do,
                with or without a BOS token: the first token has inputs of its own kind.
            loss: ``loss(model, batch)``, the mean negative log likelihood of labels *drawn from the model*, a scalar;
                or that and the number of predictions in the mean. Without the number, rows with a gradient at the
                model's logits are counted. Whether labels are drawn from the model cannot be checked: with the labels
                of the data, the factors are those of the empirical Fisher information.
            modules: names, suffixes of names or patterns of layers. The default is every trained or adapted linear
                layer, or, if there is none, every linear layer except the language head.
            rank (int | None): rank of S and of G, half of it for each pair; the rest of each spectrum is stored as a
                diagonal. None stores the whole matrices.
            dtype: storage of the factors: torch.float32 (the default) or bfloat16.

        Raises:
            ValueError: there is no linear layer or no batch, or no batch reached some layer. A loss is not a scalar or
                not finite. Factors are not finite. An adapter is not LoRA. Layers are split over ranks (tensor
                parallelism).
            RuntimeError: the capture failed on another rank. The failed rank raises its own error.

        Warns:
            UserWarning: a layer received fewer sequences than half of ``rank``. The source covers only what they reach.
        """
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank must be a whole number of at least 1, or None, found {rank!r}")
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, found {dtype}")
        layers = select(model, find_layers(model), modules)
        half = None if rank is None else max(1, rank // 2)
        statistics, totals = capture_statistics(model, batches, loss, layers, half)
        factors = {}
        for layer in layers:
            found = statistics[layer.name]
            inputs, outputs = (each.to("cpu", dtype) for each in found.factors(totals["predictions"]))
            scale = float(found.scalars[1] / found.scalars[0])
            factors[layer.name] = LayerFactors(inputs, outputs, scale, anchor_of(layer), sample_of(layer))
        tokens, _, sequences = next(iter(statistics.values())).scalars.tolist()
        return cls(factors, {**totals, "rank": rank, "tokens": int(tokens), "sequences": int(sequences)})

    @property
    def weight(self) -> float:
        """Default weight of the pull, 100: nats of training loss per nat of KL."""
        return DEFAULT_WEIGHT

    def names(self) -> list[str]:
        """Return the names of the layers, in the model's order."""
        return list(self._layers)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return S [K, in, in] and G [K, out, out] of a layer, dense in float32. K is 2: tokens, then sequences.

        ``1/2 sum tr(D^T G D S)`` over K is the KL in nats per token.

        Raises:
            KeyError: the source has no such layer.
        """
        if layer not in self._layers:
            raise KeyError(f"the source has no layer {layer!r}; it has {len(self._layers)}, such as {self.names()[:3]}")
        found = self._layers[layer]
        return found.inputs.dense(), found.outputs.dense()

    def bound(
        self, model: nn.Module, earlier: Iterable[StructuredSource] = (), given: Container[str] | None = None
    ) -> StructuredSource:
        """Return the source for the parameters of ``model`` that change its layers. The factors are shared, not copied.

        The pull on a trained weight is relative to the captured weight. So the model must still have the captured
        weights, or a source in ``earlier`` must have been bound to the model when it had them.

        Args:
            earlier: sources bound to the model before.
            given: names of the parameters to pull; None means all parameters. Layers without any are left out.

        Raises:
            ValueError: a layer has another shape, a trained weight differs from the captured one, or no trained
                parameter changes any layer. A layer has trained parameters in ``given`` and others that are not.

        Warns:
            UserWarning: a trained weight cannot be compared: it was quantised at capture, or ``metadata`` has no entry
                "base", which was removed to use the source with another base model on purpose.
        """
        layers = self._layers
        if not {"base", "merged"} & self.metadata.keys():
            layers = {name: replace(factors, weight=None) for name, factors in layers.items()}
        bindings = [each._binding for each in (self, *earlier) if each._binding is not None]
        source = copy.copy(self)
        source._binding = Binding(model, layers, self.floor, bindings, given)
        source._rows, source.drift = {}, None
        return source

    @property
    def pulled(self) -> set[str]:
        """Names of the parameters that the source pulls; none before it is bound to a model."""
        return set() if self._binding is None else set(self._binding.names)

    def shapes(self) -> None:
        """Return None: it covers any parameter, with a zero row for one that changes none of its layers."""
        return

    def fingerprint(self) -> str:
        """Return a digest of layers and values."""
        digest = hashlib.sha256(repr(self.floor).encode())
        for name, held in self._layers.items():
            parts = [held.inputs.basis, held.inputs.rest, held.outputs.basis, held.outputs.rest, *(held.anchor or ())]
            for part in parts if held.weight is None else [*parts, held.weight]:
                digest.update(f"{name} {tuple(part.shape)} {part.dtype} {held.scale}".encode())
                digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def shards(self, layouts: Mapping[str, Layout]) -> StructuredSource:
        """Return the source itself: factors are whole on every rank, and the pull is sharded when it is computed."""
        return self

    def refresh(self, parameters: Mapping[str, Tensor], trained: Sequence[Tensor]) -> None:
        """Compute the pull at the current parameters.

        Raises:
            RuntimeError: the source is not bound to a model, or a parameter that changes a layer was frozen or in an
                inactive adapter when it was bound.
        """
        if self._binding is None:
            raise RuntimeError("a structured source needs the model: pass names=model to GradGuide")
        if parameters:
            self._rows, self.drift = self._binding.pull(parameters)

    def row(self, names: Sequence[str], at: Sequence[Tensor]) -> Row:
        """Return the pull on the parameters ``names``; zero for a parameter that changes no layer."""
        return row_or_zeros(self._rows, names, at)

    @staticmethod
    def merge(sources: Sequence[StructuredSource], weights: Sequence[float] | None = None) -> StructuredSource:
        """Return one source for several tasks of one base model, with the memory of one in float32.

        S and G of each pair, and anchors, are merged separately: as weighted sums, S and G truncated to the largest
        rank. A sum of Kronecker products is not a Kronecker product. The merged source loses which inputs belong to
        which outputs, so it also penalises combinations that no single task used.

        Raises:
            ValueError: there is no source, the weights do not match, or two sources have a layer of different shapes.
                Two sources were captured at different weights of a layer; the merged source would have no weight that
                its pull is relative to.
        """
        if not sources:
            raise ValueError("merge needs at least one source, found none")
        given = [1.0 / len(sources)] * len(sources) if weights is None else list(map(float, weights))
        good = len(given) == len(sources) and all(0 <= weight < math.inf for weight in given) and any(given)
        if not good:
            raise ValueError(f"weights must be {len(sources)} numbers of at least 0, not all 0, found {weights}")
        layers = {}
        for name in dict.fromkeys(name for source in sources for name in source.names()):
            held = [(s._layers[name], w) for s, w in zip(sources, given, strict=True) if name in s._layers]
            total = sum(weight for _, weight in held) or 1.0
            rank = max(max(f.inputs.rank, f.outputs.rank) for f, _ in held)
            anchors = [(f.anchor, w / total) for f, w in held if f.anchor is not None]
            if len({(f.shape, f.pairs) for f, _ in held}) > 1:
                raise ValueError(
                    f"layer {name} has another shape in some of the sources: they are of other base models"
                )
            samples = [f.weight for f, _ in held if f.weight is not None]
            if any(count_differences(samples[0], sample) for sample in samples[1:]):
                raise ValueError(
                    f"the sources to merge were captured at different weights of {name}: pass them to Alignment as a "
                    "list instead"
                )
            layers[name] = LayerFactors(
                merged([f.inputs for f, _ in held], [w / total for _, w in held], rank),
                merged([f.outputs for f, _ in held], [w for _, w in held], rank),
                sum(f.scale * w / total for f, w in held),
                weighted_sum(anchors),
                samples[0] if samples else None,
            )
        return StructuredSource(layers, {"merged": [source.metadata for source in sources]})

    def to_dtype(self, dtype: torch.dtype) -> StructuredSource:
        """Return the source with its factors stored in ``dtype``, torch.float32 or bfloat16."""
        layers = {
            name: replace(f, inputs=f.inputs.to(dtype=dtype), outputs=f.outputs.to(dtype=dtype))
            for name, f in self._layers.items()
        }
        source = StructuredSource(layers, self.metadata)
        source.floor = self.floor
        return source

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically."""
        storage.write(path, self._layers, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StructuredSource:
        """Read a file written by :meth:`save`. Nothing is unpickled.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, holds no structured source, or has an older or newer layout.
        """
        layers, metadata = storage.read(path)
        try:
            return cls(layers, metadata)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is damaged: {error}") from error

    def __repr__(self) -> str:
        numbers = sum(f.numel() for h in self._layers.values() for f in (h.inputs.basis, h.outputs.basis))
        return f"StructuredSource({len(self._layers)} layers, {numbers} numbers)"
