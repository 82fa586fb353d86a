"""A source gradient that was captured once: stored, portable, and moving with the parameters if it has curvature."""

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
from gradguide.sources.capture import Batch, Loss, capture_tables
from gradguide.sources.merge import merged_tables
from gradguide.sources.metadata import check_metadata
from gradguide.sources.tables import checked_tables, digest, read_tables
from gradguide.utils.names import NamesLike

__all__ = ["SourceGradient"]

ANCHORED_WEIGHT = 1.0


class SourceGradient:
    """The mean gradient of a source task's loss, ``s0``, and optionally its diagonal Fisher information.

    With curvature it answers ``s0 + F * (theta - theta0)``, the first-order model of the source gradient at the present
    parameters, so that it does not go stale while they move. Without it, it answers s0 wherever the parameters are.
    :meth:`anchored` makes of it a pull back to where the model knew its source, of a strength that does not depend on
    how sure of itself the model was there.

    Made by :meth:`capture` or :meth:`load`; give it to :class:`gradguide.Alignment`.
    """

    def __init__(
        self,
        gradient: Mapping[str, Tensor] | None,
        *,
        fisher: Mapping[str, Tensor] | None = None,
        anchor: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Put together tensors by parameter name, all with the same names and shapes.

        Args:
            gradient: s0, or None for a source at its optimum, where it is zero.
            fisher, anchor: F and theta0, both or neither.
            metadata: what to remember about the capture; JSON types.

        Raises:
            ValueError: no tensor, only one of fisher and anchor, names or shapes that differ, or a number that is not
                finite, or negative in fisher; metadata of other types than the library writes.
            TypeError: a tensor is not of floating numbers of 16, 32 or 64 bits.
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
        curvature: bool | Callable[[nn.Module, Any], Tensor] = True,
        dtype: torch.dtype | None = None,
        names: NamesLike | None = None,
        mode: str = "eval",
        examples: Callable[[Any], int] | None = None,
    ) -> SourceGradient:
        """Capture the mean gradient over source data at the model's present parameters.

        Modes, buffers (BatchNorm's statistics), gradients, parameters and torch's random state are afterwards as they
        were. Under ``torch.distributed`` every rank gives its share of the data and gets the same answer. Reentrant
        and other activation checkpointing, DDP, FSDP2 and compiled models are captured as they are trained.

        The source remembers its base model by an id and a few frozen weights. An optimizer whose ``names`` reach frozen
        weights of other values refuses it; float32 and 16-bit storage of one model count as the same. Without frozen
        weights (full fine-tuning) the id is kept and nothing is compared: the anchor is where training starts, and a
        large distance from it is normal later. To use a source with another base model on purpose, remove the entry
        "base" from its ``metadata``.

        A parameter that no batch reaches (a layer that the loss does not use, an expert without tokens) is stored as
        zero with a warning, so that the source does not act on it.

        Args:
            model: only parameters with ``requires_grad`` are captured, and of these only those in ``names``.
            batches: tensors, mappings or sequences of tensors; with ``examples``, anything. Curvature wants small
                batches (1 to 16): a batch's gradient says the less of F the larger the batch.
            loss: ``loss(model, batch)``, the mean over the batch's examples, a scalar.
            curvature: True estimates the empirical Fisher information, the mean square of per-example gradients,
                without bias from the batches' gradients. A callable is a second loss, of the same kind, under labels
                drawn from the model; it gives the true Fisher information, at one more backward pass per batch.
                False keeps s0 alone.
            dtype: storage of s0 and F: torch.float32 (the default), bfloat16 or float64.
            names: what to capture, in any form that :class:`gradguide.GradGuide` takes; None captures every trained
                parameter. Give the same to both, as ``names=lora_parameters(model)``, which leaves out the head that
                PEFT trains beside an adapter.
            mode: "eval" (the default), "train" (for a loss that exists in that mode only; dropout is on), or "keep",
                each module's own mode.
            examples: ``examples(batch)``, how many the batch holds. By default the first dimension of its first tensor
                counts them, which is wrong for packed sequences and graphs.

        Returns:
            The captured source.

        Raises:
            ValueError: no trainable parameter, none of them in ``names``, no batch, a loss that is no finite scalar or
                reaches none of the parameters, a single batch of several examples with ``curvature=True``, a mode that
                there is not, a dtype that cannot hold the rows.
            TypeError: a batch whose examples cannot be counted.
            RuntimeError: a parameter has a hook that runs in backward after its gradient is accumulated.

        Warns:
            UserWarning: no batch reached some parameters; the gradient of LoRA's A matrices is zero, because B is
                still zero; tensors of a batch differ in their first dimension.
        """
        dtype = torch.float32 if dtype is None else dtype
        gradient, fisher, anchor, metadata = capture_tables(
            model, batches, loss, curvature=curvature, dtype=dtype, names=names, mode=mode, examples=examples
        )
        return cls(gradient, fisher=fisher, anchor=anchor, metadata=metadata)

    @property
    def curvature(self) -> bool:
        """Whether the answer moves with the parameters."""
        return "fisher" in self._tables

    @property
    def weight(self) -> float:
        """Weight of its pull where none is asked for: see :class:`gradguide.Alignment`."""
        return 0.0 if "gradient" in self._tables else ANCHORED_WEIGHT

    @property
    def fisher(self) -> dict[str, Tensor]:
        """Fisher information by name, of an anchored source how firmly it holds; empty without curvature."""
        return dict(self._tables.get("fisher", {}))

    @property
    def anchor(self) -> dict[str, Tensor]:
        """The parameters at capture, theta0, by name; empty without curvature."""
        return dict(self._tables.get("anchor", {}))

    def names(self) -> list[str]:
        """Names of the parameters that the source speaks of, in the model's order."""
        return list(self._first)

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter that the source speaks of, by name."""
        return {name: tensor.shape for name, tensor in self._first.items()}

    def anchored(self) -> SourceGradient:
        """The same source as a pull back to where it was captured: ``H * (theta - theta0)``.

        ``H = sqrt(F) / mean(sqrt(F)) / |theta0|``, mean and length over all its parameters together; of parameters
        shorter than 0.01 in root mean square, the length that they would have at that. So at weight 1 parameters
        that have moved by their own length are pulled back with length 1, to which gradients are clipped by default,
        whatever the size of the model.

        s0 is left out: what training left of the source gradient is a reason neither to move nor to stop, and at a
        weight that matters its stale direction outweighs everything else. F is brought to scale, because it vanishes
        as a model grows sure of its source (on a handful of rows, fitted, it is 1e-9 and less), while what there is to
        lose does not. Its root goes with the size of the gradient's elements, as Adam's second moments do, so each is
        held in proportion to how hard it is pulled elsewhere. A source without s0 is anchored already.

        Elastic weight consolidation (arXiv 1612.00796) is the pull with F as it is, at a weight of its own:
        ``SourceGradient(None, fisher=source.fisher, anchor=source.anchor)``.

        Raises:
            ValueError: the source was captured without curvature, so that nothing would be left.
        """
        if not self.curvature:
            raise ValueError("anchored() needs a source with curvature, found none: capture it with curvature=True")
        if "gradient" not in self._tables:
            return self
        anchor = self._tables["anchor"]
        held = anchor_weights(self._tables["fisher"], anchor)
        return SourceGradient(None, fisher=held, anchor=anchor, metadata=self.metadata)

    def renamed(self, names: Mapping[str, str]) -> SourceGradient:
        """Return the same source under other names, with the same tensors.

        Args:
            names: present name to new name; names outside it stay.
        """
        source = copy.copy(self)
        source._tables = {
            label: {names.get(name, name): tensor for name, tensor in table.items()}
            for label, table in self._tables.items()
        }
        return source

    @staticmethod
    def merge(sources: Sequence[SourceGradient], weights: Sequence[float] | None = None) -> SourceGradient:
        """One source for several, which answers with the weighted sum of what they answer, wherever the parameters are.

        ``sum_k w_k (s_k + F_k (theta - theta_k))`` is again of that form: with ``F = sum_k w_k F_k`` and theta0 the
        mean of the theta_k by ``w_k F_k``, element by element, it is ``S + F (theta - theta0)``, where S is the sum of
        the ``w_k s_k``. So K sources cost the memory of one, and are one constraint in place of K: on their sum, as in
        A-GEM.

        Args:
            sources: at least one, all of the same names and shapes, all with curvature or all without, all anchored or
                none.
            weights: one each, at least 0, not all 0; equal and summing to 1 if not given.

        Raises:
            ValueError: the sources or the weights do not fit together.
        """
        tables = merged_tables([source._tables for source in sources], weights)
        merged = [m for source in sources for m in source.metadata.get("merged", [source.metadata])]
        return SourceGradient._of(tables, {"merged": merged})

    def fingerprint(self) -> str:
        """Digest of names, shapes and numbers."""
        return digest(self._tables)

    def shards(self, layouts: Mapping[str, Layout]) -> SourceGradient:
        """This rank's parts of the tables, for parameters that are sharded; others stay whole. No communication."""
        tables = {
            label: {name: shard(t, layouts[name]) if name in layouts else t for name, t in table.items()}
            for label, table in self._tables.items()
        }
        return SourceGradient._of(tables, self.metadata)

    def refresh(self, parameters: Mapping[str, Tensor], trained: Sequence[Tensor]) -> None:
        """What is stored needs none."""

    def row(self, names: Sequence[str], at: Sequence[Tensor]) -> Row:
        """The source gradient at the parameters ``at`` called ``names``; its tensors move to their device once."""
        gradient = self._rows("gradient", names, at) if "gradient" in self._tables else None
        if not self.curvature:
            return Row(offset=gradient)
        return Row(
            offset=gradient, scale=self._rows("fisher", names, at), at=at, anchor=self._rows("anchor", names, at)
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all.

        Raises:
            ValueError: an entry of ``metadata`` that the library reads is of another type than it writes.
            OSError: the file cannot be written.
        """
        check_metadata(self.metadata)
        files.write(path, self._tables, {**self.metadata, "names": self.names()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SourceGradient:
        """Read a file of :meth:`save`. Nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, not safetensors, no source file, damaged, or of a newer format.
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
        """A source of tables by their names."""
        given = dict(tables)
        return cls(given.pop("gradient", None), metadata=metadata, **given)

    @property
    def _first(self) -> dict[str, Tensor]:
        return next(iter(self._tables.values()))

    def _rows(self, label: str, names: Sequence[str], at: Sequence[Tensor]) -> list[Tensor]:
        """Return a table's tensors for these names. They move to the parameters' device once."""
        table = self._tables[label]
        for name, parameter in zip(names, at, strict=True):
            if table[name].device != parameter.device:
                table[name] = table[name].to(parameter.device)
        return [table[name] for name in names]
