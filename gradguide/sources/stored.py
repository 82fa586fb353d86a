"""Store a source gradient that was captured once. With curvature, it depends on the current parameters."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import Layout, shard
from gradguide.ops.row import Row
from gradguide.sources import files
from gradguide.sources.anchor_weights import anchor_weights
from gradguide.sources.capture import Batch, capture_tables
from gradguide.sources.loss_value import Loss
from gradguide.sources.merge import merged_tables
from gradguide.sources.metadata import check_metadata
from gradguide.sources.stored_tables import checked_tables, digest, read_tables
from gradguide.utils.names import NamesLike

__all__ = ["SourceGradient"]

ANCHORED_WEIGHT = 1.0


class SourceGradient:
    """The mean gradient of a source task's loss, ``s0``, and optionally its diagonal Fisher information.

    With curvature, the gradient is ``s0 + F * (theta - theta0)``. This first-order model of the source gradient stays
    valid while parameters change. Without curvature it is s0 at all parameters.
    :meth:`anchored` turns it into a pull back to the captured parameters. Its strength does not depend on the
    confidence of the model at capture.

    Create it with :meth:`capture` or :meth:`load`, and pass it to :class:`gradguide.Alignment`.
    """

    def __init__(
        self,
        gradient: Mapping[str, Tensor] | None,
        *,
        fisher: Mapping[str, Tensor] | None = None,
        anchor: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Create a source from tensors by parameter name. All mappings must have the same names and shapes.

        Args:
            gradient: s0, or None for a source at its optimum, where s0 is zero.
            fisher, anchor: F and theta0, both or neither.
            metadata: facts about the capture; JSON types.

        Raises:
            ValueError: there is no tensor, only one of fisher and anchor is given, or names or shapes differ. A number
                is not finite, or negative in fisher. Metadata has other types than the library writes.
            TypeError: a tensor has no floating dtype of 16, 32 or 64 bits.
        """
        if (fisher is None) != (anchor is None):
            raise ValueError("a source gradient has both fisher and anchor, or neither")
        self._tables = checked_tables({"gradient": gradient, "fisher": fisher, "anchor": anchor})
        self.metadata: dict[str, Any] = dict(metadata or {})
        check_metadata(self.metadata)

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Loss,
        *,
        curvature: bool | Loss = True,
        dtype: torch.dtype | None = None,
        names: NamesLike | None = None,
        mode: str = "eval",
        examples: Callable[[Any], int] | None = None,
    ) -> SourceGradient:
        """Capture the mean gradient over source data at the model's current parameters.

        Modes, buffers (BatchNorm's statistics), gradients, parameters and torch's random state do not change. Under
        ``torch.distributed``, every rank supplies its share of the data, and all ranks (under DDP those of its process
        group) get the same source. Activation checkpointing (also reentrant), DDP, FSDP2 and compiled models work.

        The source stores an id and a few frozen weights of its base model. An optimizer raises ValueError if frozen
        weights reachable through its ``names`` have other values. Differences between float32 and 16-bit storage are
        tolerated. Without frozen weights (full fine-tuning), the id is stored and nothing is compared, because trained
        weights move away from the captured ones. To use a source with another base model on purpose, remove the entry
        "base" from its ``metadata``.

        If no batch reaches a parameter (a layer that the loss does not use, an expert without tokens), it is stored as
        zero with a warning. The source then does not act on it.

        Args:
            model: only parameters with ``requires_grad`` that are in ``names`` are captured.
            batches: tensors, mappings or sequences of tensors; with ``examples``, any objects. For curvature use small
                batches (1 to 16): the larger the batch, the less its gradient reveals of F.
            loss: ``loss(model, batch)``, the mean over the batch's examples, a scalar; or that and the number of
                examples (of tokens, if they are the terms of the mean), by which batches are weighted.
            curvature: True estimates the empirical Fisher information, the mean square of per-example gradients. The
                estimate from batch gradients is unbiased. A callable is a second loss with the same signature, with
                labels drawn from the model, such as ``sampled_loss``. It gives the true Fisher information and needs
                one more backward pass per batch. False stores s0 alone.
            dtype: storage of s0 and F: torch.float32 (the default), bfloat16 or float64.
            names: the parameters to capture, in any form that :class:`gradguide.GradGuide` accepts; None captures all
                trained parameters. Pass the same to both. ``names=lora_parameters(model)`` excludes the head that PEFT
                trains in addition to an adapter.
            mode: "eval" (the default), "train" (for a loss that needs that mode; dropout is active), or "keep", each
                module's own mode.
            examples: ``examples(batch)``, the number of examples in the batch, for losses that do not return it. The
                default is the first dimension of its first tensor, which is wrong for packed sequences and graphs.

        Returns:
            The captured source.

        Raises:
            ValueError: there is no batch, no trainable parameter, or none of them is in ``names``. The loss is not a
                finite scalar or reaches none of the parameters. There is a single batch of several examples with
                ``curvature=True``. The mode is unknown, or the dtype cannot hold the rows.
            TypeError: the examples of a batch cannot be counted.
            RuntimeError: a parameter has a hook that runs in backward after its gradient is accumulated. The capture
                failed on another rank.

        Warns:
            UserWarning: no batch reached some parameters. The gradient of LoRA's A matrices is zero, because B is
                still zero. Tensors of a batch differ in their first dimension.
        """
        dtype = torch.float32 if dtype is None else dtype
        gradient, fisher, anchor, metadata = capture_tables(
            model, batches, loss, curvature=curvature, dtype=dtype, names=names, mode=mode, examples=examples
        )
        return cls(gradient, fisher=fisher, anchor=anchor, metadata=metadata)

    @property
    def curvature(self) -> bool:
        """Whether the gradient depends on the current parameters."""
        return "fisher" in self._tables

    @property
    def weight(self) -> float:
        """Default weight of the pull: see :class:`gradguide.Alignment`."""
        return 0.0 if "gradient" in self._tables else ANCHORED_WEIGHT

    @property
    def fisher(self) -> dict[str, Tensor]:
        """Fisher information by name, or H of an anchored source; empty without curvature."""
        return dict(self._tables.get("fisher", {}))

    @property
    def anchor(self) -> dict[str, Tensor]:
        """Parameters at capture, theta0, by name; empty without curvature."""
        return dict(self._tables.get("anchor", {}))

    def names(self) -> list[str]:
        """Return the names of the parameters that the source covers, in the model's order."""
        return list(self._first)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each parameter that the source covers, by name."""
        return {name: tensor.shape for name, tensor in self._first.items()}

    def anchored(self) -> SourceGradient:
        """Return the source as a pull back to the captured parameters: ``H * (theta - theta0)``.

        ``H = sqrt(F) / mean(sqrt(F)) / |theta0|``, with mean and norm over all its parameters together. The norm has a
        lower bound: that of parameters with a root mean square of 0.01. At weight 1 and a distance of ``|theta0|``, the
        pull has a norm of about 1 for any model size. This is the default bound of gradient clipping.

        s0 is dropped. It is the gradient that remains after source training, and it goes stale. At a useful weight it
        would dominate all other terms. F is normalized, because it vanishes as the model becomes confident on its
        source: it is 1e-9 or less when fitted to a few rows. The possible loss does not vanish. sqrt(F) is proportional
        to the size of gradient elements, like the square root of Adam's second moments. So each element is held in
        proportion to its gradients. A source without s0 is returned unchanged.

        For elastic weight consolidation (arXiv 1612.00796), which uses F itself with a separate weight, create
        ``SourceGradient(None, fisher=source.fisher, anchor=source.anchor)``.

        Raises:
            ValueError: the source was captured without curvature.
        """
        if not self.curvature:
            raise ValueError("anchored() needs a source with curvature, found none: capture it with curvature=True")
        if "gradient" not in self._tables:
            return self
        anchor = self._tables["anchor"]
        weights = anchor_weights(self._tables["fisher"], anchor)
        return SourceGradient(None, fisher=weights, anchor=anchor, metadata={**self.metadata, "anchored": True})

    def renamed(self, names: Mapping[str, str]) -> SourceGradient:
        """Return the same source under other names, with the same tensors.

        Args:
            names: new name by current name; other names stay.
        """
        source = copy.copy(self)
        source._tables = {
            label: {names.get(name, name): tensor for name, tensor in table.items()}
            for label, table in self._tables.items()
        }
        return source

    @staticmethod
    def merge(sources: Sequence[SourceGradient], weights: Sequence[float] | None = None) -> SourceGradient:
        """Return one source whose gradient is the weighted sum of theirs, at any parameters.

        ``sum_k w_k (s_k + F_k (theta - theta_k))`` has the same form, ``S + F (theta - theta0)``, with
        ``S = sum_k w_k s_k`` and ``F = sum_k w_k F_k``. theta0 is the elementwise mean of the theta_k, weighted by
        ``w_k F_k``. So K sources need the memory of one. They give one constraint, on their sum, as in A-GEM, instead
        of K.

        Args:
            sources: at least one, with the same names and shapes. All have curvature or none has; all are anchored or
                none is.
            weights: one per source, at least 0, not all 0. The default is equal weights that sum to 1.

        Raises:
            ValueError: the sources or the weights do not match.
        """
        tables = merged_tables([source._tables for source in sources], weights)
        merged = [m for source in sources for m in source.metadata.get("merged", [source.metadata])]
        anchored = {"anchored": True} if any(source.metadata.get("anchored") for source in sources) else {}
        return SourceGradient._of(tables, {"merged": merged} | anchored)

    def fingerprint(self) -> str:
        """Return a digest of names, shapes and values."""
        return digest(self._tables)

    def shards(self, layouts: Mapping[str, Layout]) -> SourceGradient:
        """Return the source with the local parts of sharded parameters; others stay whole. No communication."""
        tables = {
            label: {name: shard(t, layouts[name]) if name in layouts else t for name, t in table.items()}
            for label, table in self._tables.items()
        }
        return SourceGradient._of(tables, self.metadata)

    def refresh(self, parameters: Mapping[str, Tensor], trained: Sequence[Tensor]) -> None:
        """Do nothing: a stored source needs no update."""

    def row(self, names: Sequence[str], at: Sequence[Tensor]) -> Row:
        """Return the source gradient for parameters ``names`` at values ``at``, on their device."""
        gradient = self._rows("gradient", names, at) if "gradient" in self._tables else None
        if not self.curvature:
            return Row(offset=gradient)
        return Row(
            offset=gradient, scale=self._rows("fisher", names, at), at=at, anchor=self._rows("anchor", names, at)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically.

        Raises:
            ValueError: an entry of ``metadata`` that the library reads has another type than it writes.
            OSError: the file cannot be written.
        """
        check_metadata(self.metadata)
        files.write(path, self._tables, {**self.metadata, "names": self.names()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SourceGradient:
        """Read a file written by :meth:`save`. Nothing is unpickled.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is truncated, not safetensors, not a source file, damaged, of a structured source, in 8
                bits (gradguide 0.1.0), or of a newer format.
        """
        tables, metadata = read_tables(path)
        try:
            return cls._of(tables, metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is damaged: {error}") from error

    def __repr__(self) -> str:
        tensors = self._first.values()
        kind = ("moving" if "gradient" in self._tables else "anchored") if self.curvature else "fixed"
        return f"SourceGradient({len(tensors)} tensors, {sum(t.numel() for t in tensors)} numbers, {kind})"

    @classmethod
    def _of(cls, tables: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]) -> SourceGradient:
        """Return a source of tables by label."""
        given = dict(tables)
        return cls(given.pop("gradient", None), metadata=metadata, **given)

    @property
    def _first(self) -> dict[str, Tensor]:
        return next(iter(self._tables.values()))

    def _rows(self, label: str, names: Sequence[str], at: Sequence[Tensor]) -> list[Tensor]:
        """Return a table's tensors for these names, moved to the parameters' device. The move happens once."""
        table = self._tables[label]
        for name, parameter in zip(names, at, strict=True):
            if table[name].device != parameter.device:
                table[name] = table[name].to(parameter.device)
        return [table[name] for name in names]
