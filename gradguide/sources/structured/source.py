"""A source in weight space: what each linear layer of a base model receives and what its output is worth."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.checks import check_range
from gradguide.naming import canonical
from gradguide.ops.row import Row
from gradguide.sharding import Layout, layout_of, shard
from gradguide.sources.structured import storage
from gradguide.sources.structured.capture import Loss, measure
from gradguide.sources.structured.factors import Factor, merged, stacked
from gradguide.sources.structured.layers import Layer, change, find_layers, select
from gradguide.sources.structured.pull import adapter_pull, weight_pull

__all__ = ["StructuredSource"]

DEFAULT_WEIGHT = 100.0
FLOOR = 0.1


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """What is stored of one linear layer.

    inputs (Factor): S = E[x x^T] over tokens, [in, in].
    outputs (Factor): G, from gradients of log p at the output, [out, out]: 1/2 tr(D^T G D S) is KL in nats per token.
    scale (float): E|y|^2 of the layer's outputs y.
    anchor: the adapters' change of the weight where the source was captured, as ([out, R], [R, in]); None at the base.
    """

    inputs: Factor
    outputs: Factor
    scale: float
    anchor: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class BoundLayer:
    """Which parameters of a model change a layer.

    adapters: names of A and B, and the scale, of each trained adapter.
    frozen: the frozen adapters' change of the weight, or None.
    weight, start: name of the weight where it is trained itself, and its values at the base.
    """

    name: str
    transposed: bool
    adapters: tuple[tuple[str, str, float], ...]
    frozen: tuple[Tensor, Tensor] | None
    weight: str | None
    start: Tensor | None


@dataclass(slots=True)
class _Group:
    """Layers of one shape and kind, with their factors stacked."""

    layers: list[BoundLayer]
    inputs: Factor
    outputs: Factor
    floor: Tensor
    fixed: tuple[Tensor, Tensor] | None = field(default=None)


class StructuredSource:
    """The curvature of what a language model knows, per linear layer, in weight space.

    A linear layer computes ``W x``, and training changes W by D: ``scale * B A`` for a LoRA adapter. The Kullback-Leibler
    divergence from the model before is about ``1/2 tr(D^T G D S)`` nats per token, summed over layers, with S the
    covariance of the layer's inputs and G that of the gradients of log p at its outputs (Kronecker-factored curvature,
    arXiv 1503.05671; for keeping old tasks, arXiv 1805.07810). The source answers with the gradient of that with
    respect to A and B, or W. It depends on D alone, so one file serves every adapter of a base model.

    Made by :meth:`capture` or :meth:`load`; give it to :class:`gradguide.Alignment`, and the model to ``names``.
    """

    def __init__(self, layers: Mapping[str, LayerFactors], metadata: Mapping[str, Any] | None = None) -> None:
        """Put together factors by layer name.

        Raises:
            ValueError: there is no layer, or a factor is not finite or negative.
        """
        if not layers:
            raise ValueError("a structured source needs at least one layer, found none")
        for name, factors in layers.items():
            parts = [factors.inputs.basis, factors.inputs.rest, factors.outputs.basis, factors.outputs.rest]
            if not all(bool(part.isfinite().all()) for part in parts):
                raise ValueError(f"the factors of {name} must be finite, found NaN or Inf")
            if bool((factors.inputs.rest < 0).any()) or bool((factors.outputs.rest < 0).any()):
                raise ValueError(f"the diagonal rest of {name} must be at least 0")
            check_range(f"the output scale of {name}", factors.scale, 0, float("inf"), open_high=True)
        self._layers = dict(layers)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.floor = FLOOR
        self._bound: list[BoundLayer] = []
        self._groups: tuple[torch.device, list[_Group]] | None = None
        self._rows: dict[str, Tensor] = {}
        self._drift: Tensor | None = None

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

        The model runs in eval mode. Its modes, gradients, parameters, buffers and torch's random state are afterwards as
        they were. Memory beside the model: per layer ``(rank + 16) (in + out)`` numbers in float32 (layers with the same
        input share theirs), and what one batch's forward and backward pass holds. Under ``torch.distributed`` every
        rank gives its share of the batches and gets the same source.

        Args:
            model: a base model, or a PEFT model, fresh or trained.
            batches: source batches, as ``loss`` takes them.
            loss: ``loss(model, batch)``, the mean negative log likelihood of labels *drawn from the model*, a scalar; or
                that and the number of predictions it is a mean over. Without the number, rows with a gradient at the
                last layer are counted. Whether labels are drawn from the model cannot be seen from here: with
                the data's own labels the factors are those of the empirical Fisher information.
            modules: names, endings of names or patterns of layers; by default every linear layer that is trained or
                adapted, or, where the model has none, every linear layer but the language head.
            rank (int | None): rank of S and G; the rest of the spectrum is kept as a diagonal. None keeps them whole.
            dtype: storage of the factors: torch.float32 (the default) or bfloat16.

        Raises:
            ValueError: no linear layer, no batch, a layer that no batch reached, a loss that is no scalar or not finite,
                factors that are not finite.
        """
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank must be a whole number of at least 1, or None, found {rank!r}")
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, found {dtype}")
        layers = select(model, find_layers(model), modules)
        statistics, shared, totals = measure(model, batches, loss, layers, rank)
        inputs = {
            name: found.inputs.factor(1.0 / float(found.scalars[0]))
            for name, found in statistics.items()
            if shared[name] == name
        }
        factors = {
            layer.name: LayerFactors(
                inputs[shared[layer.name]].to("cpu", dtype),
                statistics[layer.name].outputs.factor(1.0 / totals["predictions"]).to("cpu", dtype),
                float(statistics[layer.name].scalars[1] / statistics[layer.name].scalars[0]),
                _anchor(layer),
            )
            for layer in layers
        }
        return cls(factors, {**totals, "rank": rank, "tokens": int(next(iter(statistics.values())).scalars[0])})

    @property
    def weight(self) -> float:
        """Default weight of the pull."""
        return DEFAULT_WEIGHT

    def names(self) -> list[str]:
        """Return the names of the layers, in the model's order."""
        return list(self._layers)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return S [in, in] and G [out, out] of a layer, dense in float32: 1/2 tr(D^T G D S) is KL in nats per token.

        Raises:
            KeyError: the source has no such layer.
        """
        if layer not in self._layers:
            raise KeyError(f"the source has no layer {layer!r}; it has {len(self._layers)}, such as {self.names()[:3]}")
        found = self._layers[layer]
        return found.inputs.dense(), found.outputs.dense()

    def bind(self, model: nn.Module) -> None:
        """Find the parameters of ``model`` that change the source's layers.

        Raises:
            ValueError: a layer has another shape, or no trained parameter changes any layer.
        """
        names = {id(p): canonical(name) for name, p in model.named_parameters()}
        bound = []
        for name, layer in find_layers(model).items():
            if name not in self._layers:
                continue
            held = self._layers[name]
            if layer.shape != (held.outputs.size, held.inputs.size):
                raise ValueError(
                    f"layer {name} has shape {layer.shape}, the source {(held.outputs.size, held.inputs.size)}: it was "
                    "captured from another model"
                )
            found = _bound(layer, names)
            if found.adapters or found.weight:
                bound.append(found)
        if not bound:
            raise ValueError(
                f"no trained parameter of the model changes one of the source's {len(self._layers)} layers: add an "
                "adapter, unfreeze weights, or capture the layers that are trained"
            )
        self._bound, self._groups, self._rows = bound, None, {}

    def shapes(self) -> None:
        """Return None: it answers for any parameter, with zero for one that changes none of its layers."""
        return

    def fingerprint(self) -> str:
        """Return a digest of layers and numbers."""
        digest = hashlib.sha256(repr(self.floor).encode())
        for name, held in self._layers.items():
            anchor = held.anchor or ()
            for part in (held.inputs.basis, held.inputs.rest, held.outputs.basis, held.outputs.rest, *anchor):
                digest.update(f"{name} {tuple(part.shape)} {part.dtype} {held.scale}".encode())
                digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def shards(self, layouts: Mapping[str, Layout]) -> StructuredSource:
        """Return the source itself: factors are whole on every rank, and the pull is cut where it is written."""
        return self

    @torch.no_grad()
    def refresh(self, parameters: Mapping[str, Tensor], trained: Sequence[Tensor]) -> None:
        """Compute the pull at the parameters as they are."""
        self._rows = {}
        drifts = []
        for group in self._grouped(parameters):
            drifts.append(self._pull(group, parameters))
        self._drift = torch.cat(drifts).sum() if drifts else None

    def row(self, names: Sequence[str], at: Sequence[Tensor]) -> Row:
        """Return the pull on the parameters called ``names``; zero where a parameter changes no layer."""
        pairs = zip(names, at, strict=True)
        return Row(offset=[self._rows[n] if n in self._rows else torch.zeros_like(p) for n, p in pairs])

    @property
    def drift(self) -> Tensor | None:
        """Modelled KL in nats per token from where the source was captured, at the last step: Tensor []."""
        return self._drift

    @staticmethod
    def merge(sources: Sequence[StructuredSource], weights: Sequence[float] | None = None) -> StructuredSource:
        """Return one source for several tasks of one base model, at the memory of one.

        S and G are merged by themselves (weighted sums, cut to the largest rank), and so are anchors, weighted alike. A
        sum of Kronecker products is no Kronecker product: what is lost is which inputs went with which outputs, so that
        the merged source also holds combinations that no single task used.

        Raises:
            ValueError: there is none, or the weights do not fit.
        """
        if not sources:
            raise ValueError("merge needs at least one source, found none")
        given = [1.0 / len(sources)] * len(sources) if weights is None else list(map(float, weights))
        if len(given) != len(sources) or any(weight < 0 for weight in given) or not any(given):
            raise ValueError(f"weights must be {len(sources)} numbers of at least 0, not all 0, found {weights}")
        names = list(dict.fromkeys(name for source in sources for name in source.names()))
        layers = {}
        for name in names:
            held = [(s._layers[name], w) for s, w in zip(sources, given, strict=True) if name in s._layers]
            total = sum(weight for _, weight in held) or 1.0
            rank = max(max(f.inputs.rank, f.outputs.rank) for f, _ in held)
            anchors = [(f.anchor, w / total) for f, w in held if f.anchor is not None]
            layers[name] = LayerFactors(
                merged([f.inputs for f, _ in held], [w / total for _, w in held], rank),
                merged([f.outputs for f, _ in held], [w for _, w in held], rank),
                sum(f.scale * w / total for f, w in held),
                None
                if not anchors
                else (torch.cat([left * w for (left, _), w in anchors], dim=1), torch.cat([r for (_, r), _ in anchors])),
            )
        return StructuredSource(layers, {"merged": [source.metadata for source in sources]})

    def to_dtype(self, dtype: torch.dtype) -> StructuredSource:
        """Return the source with its factors stored in ``dtype``, torch.float32 or bfloat16."""
        layers = {
            name: LayerFactors(f.inputs.to(dtype=dtype), f.outputs.to(dtype=dtype), f.scale, f.anchor)
            for name, f in self._layers.items()
        }
        return StructuredSource(layers, self.metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        storage.write(path, self._layers, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StructuredSource:
        """Read a file of :meth:`save`. Nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no structured source, or of a newer format.
        """
        layers, metadata = storage.read(path)
        return cls(layers, metadata)

    def __repr__(self) -> str:
        numbers = sum(
            f.numel() for h in self._layers.values() for f in (h.inputs.basis, h.outputs.basis)
        )
        return f"StructuredSource({len(self._layers)} layers, {numbers} numbers)"

    def _grouped(self, parameters: Mapping[str, Tensor]) -> list[_Group]:
        """Stack the factors of layers of one shape, once per device."""
        device = next(iter(parameters.values())).device
        if self._groups is not None and self._groups[0] == device:
            return self._groups[1]
        kinds: dict[tuple[Any, ...], list[BoundLayer]] = {}
        for bound in self._bound:
            held = self._layers[bound.name]
            fixed = _fixed(bound, held)
            ranks = tuple(parameters[a].shape[0] for a, _, _ in bound.adapters if a in parameters)
            key = (held.outputs.size, held.inputs.size, ranks, None if fixed is None else fixed[0].shape[1])
            kinds.setdefault((*key, bound.weight is not None, bound.transposed), []).append(bound)
        groups = []
        for bounds in kinds.values():
            held = [self._layers[b.name] for b in bounds]
            fixed = [_fixed(b, h) for b, h in zip(bounds, held, strict=True)]
            there = [pair for pair in fixed if pair is not None]
            groups.append(
                _Group(
                    bounds,
                    stacked([h.inputs for h in held]).to(device),
                    stacked([h.outputs for h in held]).to(device),
                    torch.tensor([self.floor / h.scale if h.scale > 0 else 0.0 for h in held], device=device),
                    None
                    if not there
                    else (torch.stack([x for x, _ in there]).to(device), torch.stack([y for _, y in there]).to(device)),
                )
            )
        self._groups = device, groups
        return groups

    def _pull(self, group: _Group, parameters: Mapping[str, Tensor]) -> Tensor:
        """Write the rows of a group. Returns the modelled KL of its layers."""
        inputs, outputs = group.inputs.to(dtype=torch.float32), group.outputs.to(dtype=torch.float32)
        lefts, rights, parts, first = [], [], [], 0
        for index in range(len(group.layers[0].adapters)):
            each = [bound.adapters[index] for bound in group.layers]
            a = torch.stack([_whole(parameters[name]) for name, _, _ in each]).float()
            b = torch.stack([_whole(parameters[name]) for _, name, _ in each]).float()
            scales = torch.tensor([scale for _, _, scale in each])
            scale = float(scales[0])
            lefts.append(b * scale)
            rights.append(a)
            parts.append((first, a.shape[-2], scale))
            first += a.shape[-2]
        if group.fixed is not None:
            lefts.append(group.fixed[0])
            rights.append(group.fixed[1])
        if group.layers[0].weight is not None:
            return self._pull_weights(group, inputs, outputs, parameters, lefts, rights)
        found, drift = adapter_pull(inputs, outputs, group.floor, torch.cat(lefts, -1), torch.cat(rights, -2), parts)
        for index, (b_pull, a_pull) in enumerate(found):
            for bound, b, a in zip(group.layers, b_pull, a_pull, strict=True):
                a_name, b_name, _ = bound.adapters[index]
                self._add(a_name, a, parameters)
                self._add(b_name, b, parameters)
        return drift

    def _pull_weights(
        self,
        group: _Group,
        inputs: Factor,
        outputs: Factor,
        parameters: Mapping[str, Tensor],
        lefts: list[Tensor],
        rights: list[Tensor],
    ) -> Tensor:
        moved = []
        for bound in group.layers:
            assert bound.weight is not None and bound.start is not None
            change = _whole(parameters[bound.weight]).float() - bound.start.to(parameters[bound.weight].device).float()
            moved.append(change.T if bound.transposed else change)
        d = torch.stack(moved)
        if lefts:
            d = d + torch.cat(lefts, -1) @ torch.cat(rights, -2)
        pulls, drift = weight_pull(inputs, outputs, group.floor, d)
        for bound, pull in zip(group.layers, pulls, strict=True):
            assert bound.weight is not None
            self._add(bound.weight, pull.T if bound.transposed else pull, parameters)
            for a_name, b_name, scale in bound.adapters:
                a, b = _whole(parameters[a_name]).float(), _whole(parameters[b_name]).float()
                self._add(a_name, scale * (b.T @ pull), parameters)
                self._add(b_name, scale * (pull @ a.T), parameters)
        return drift

    def _add(self, name: str, pull: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Add to the pull on a parameter; a tied one has several."""
        layout = layout_of(parameters[name])
        part = pull.contiguous() if layout is None else shard(pull, layout)
        self._rows[name] = part if name not in self._rows else self._rows[name] + part


def _whole(parameter: Tensor) -> Tensor:
    """Return a parameter whole: of a DTensor what FSDP gathers for each forward pass too."""
    return parameter.detach() if layout_of(parameter) is None else parameter.full_tensor()  # type: ignore[attr-defined, no-any-return]


def _anchor(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """Return the adapters' change of the weight at capture, unless it is zero as that of a fresh adapter."""
    found = change(layer)
    if found is None or not bool(found[0].any()) or not bool(found[1].any()):
        return None
    return found[0].cpu(), found[1].cpu()


def _bound(layer: Layer, names: Mapping[int, str]) -> BoundLayer:
    trained, fixed = [], []
    for adapter in layer.adapters:
        if adapter.a.requires_grad and adapter.b.requires_grad:
            trained.append((names[id(adapter.a)], names[id(adapter.b)], adapter.scale))
        elif bool(adapter.b.any()):
            fixed.append((adapter.b.detach().float() * adapter.scale, adapter.a.detach().float()))
    frozen = None if not fixed else (torch.cat([b for b, _ in fixed], 1).clone(), torch.cat([a for _, a in fixed]).clone())
    weight = names[id(layer.weight)] if layer.trained else None
    start = layer.weight.detach().clone() if layer.trained else None
    return BoundLayer(layer.name, layer.transposed, tuple(trained), frozen, weight, start)


def _fixed(bound: BoundLayer, held: LayerFactors) -> tuple[Tensor, Tensor] | None:
    """Return the part of D that does not change: frozen adapters, less the anchor."""
    parts = [] if bound.frozen is None else [bound.frozen]
    if held.anchor is not None:
        parts.append((-held.anchor[0], held.anchor[1]))
    if not parts:
        return None
    device = parts[0][0].device
    return torch.cat([x.to(device) for x, _ in parts], 1), torch.cat([y.to(device) for _, y in parts])
