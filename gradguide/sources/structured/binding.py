"""Bind a source to the parameters of a model that change its layers, and compute the pull on them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import as_dtensor, full, local, to_layout
from gradguide.sources.base_model import ABSOLUTE, RELATIVE
from gradguide.sources.structured.captured_weight import count_differences, sample_of
from gradguide.sources.structured.factors import Factor, LayerFactors, Product, stacked
from gradguide.sources.structured.layers import Layer, find_layers
from gradguide.sources.structured.pull import adapter_pull, weight_pull
from gradguide.sources.structured.rows import Pull, PullRows
from gradguide.utils.names import model_names

__all__ = ["Binding"]


@dataclass(frozen=True, slots=True)
class _BoundLayer:
    """The names of the parameters that change a layer.

    adapters: names of A and B, rank and scale of each adapter of which A or B is trained.
    fixed: the constant part of D: frozen adapters minus the source's anchor.
    weight, start: name and captured values of the weight, if the weight itself is trained. If the weight is sharded,
        start is sharded in the same way.
    """

    name: str
    transposed: bool
    adapters: tuple[tuple[str, str, int, float], ...]
    fixed: Product | None
    weight: str | None
    start: Tensor | None

    @property
    def kind(self) -> tuple[object, ...]:
        """Key of the layer: layers with equal key and shape are computed together.

        Each layer with a trained weight is computed alone, so that one whole weight is gathered at a time.
        """
        ranks = tuple((rank, scale) for _, _, rank, scale in self.adapters)
        return ranks, None if self.fixed is None else self.fixed[0].shape[1], self.weight, self.transposed


@dataclass(slots=True)
class _Group:
    """Layers with equal kind and shape, and their stacked factors: [layers, ...]."""

    layers: list[_BoundLayer]
    inputs: Factor
    outputs: Factor
    floor: Tensor
    fixed: Product | None


class Binding:
    """The parameters of one model that change the layers of a source.

    It holds names and values but no parameter, so it can be copied and pickled with the optimizer.

    Factors are whole on every rank. A pull needs one gather of each sharded parameter (DTensor) that changes a layer:
    all adapter matrices, or one weight at a time. Each rank computes the whole pull and keeps its own part.

    Args:
        model: a model with adapters of any rank, initialisation and name, or with trained weights.
        layers: the factors of each layer.
        floor (float): ``floor / E|y|^2`` is added to the diagonal of G for the pull, y being the layer's outputs.
        earlier: bindings to the same model from before its weights were trained.

    Raises:
        ValueError: a layer has another shape than in the source, a trained weight differs from the captured one, or no
            trained parameter changes any layer.

    Warns:
        UserWarning: the captured weight of a trained layer is unknown.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, LayerFactors], floor: float, earlier: Sequence[Binding] = ()
    ) -> None:
        starts = [start for binding in earlier for start in binding._starts]
        self._frozen: dict[str, Tensor] = {}
        names = {id(p): name for name, p in model_names(model).items()}
        kinds: dict[tuple[object, ...], list[_BoundLayer]] = {}
        for name, layer in find_layers(model).items():
            if name not in layers:
                continue
            shape = layers[name].outputs.size, layers[name].inputs.size
            if layer.shape != shape:
                raise ValueError(
                    f"layer {name} has shape {layer.shape}, the source has {shape}: it was captured from another model"
                )
            own = [start for owner, start in starts if owner == name]
            bound = _bind_layer(layer, layers[name], names, own, self._frozen)
            if bound.adapters or bound.weight:
                kinds.setdefault((*shape, *bound.kind), []).append(bound)
        if not kinds:
            raise ValueError(
                f"no trained parameter of the model changes one of the source's {len(layers)} layers: add an adapter, "
                "unfreeze weights, or capture the layers that are trained"
            )
        self._groups = [_stack_group(bounds, layers, floor) for bounds in kinds.values()]
        self._rows = PullRows()
        known = {name for name, _ in starts}
        unknown = [name for name, _ in self._starts if layers[name].weight is None and name not in known]
        if unknown:
            warnings.warn(
                f"the source does not have the captured weight of {len(unknown)} trained layers (first: {unknown[0]}), "
                "so it cannot be compared: their pull is relative to the present weight. Create GradGuide before "
                "loading trained weights",
                UserWarning,
                stacklevel=2,
            )

    @property
    def _starts(self) -> list[tuple[str, Tensor]]:
        """The captured weight by layer, for layers whose weight is trained."""
        bounds = [bound for group in self._groups for bound in group.layers]
        return [(bound.name, bound.start) for bound in bounds if bound.start is not None]

    @property
    def names(self) -> set[str]:
        """Names of the parameters with a pull."""
        found = set()
        for group in self._groups:
            for bound in group.layers:
                found |= {name for a, b, _, _ in bound.adapters for name in (a, b)}
                found |= {bound.weight} if bound.weight else set()
        return found

    def to(self, device: torch.device) -> None:
        """Move the factors to ``device``."""
        self._frozen = {name: value.to(device) for name, value in self._frozen.items()}
        for group in self._groups:
            if group.floor.device != device:
                group.inputs, group.outputs = group.inputs.to(device), group.outputs.to(device)
                group.floor = group.floor.to(device)
                if group.fixed is not None:
                    group.fixed = group.fixed[0].to(device), group.fixed[1].to(device)

    @torch.no_grad()
    def pull(self, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the pull on each parameter by name (of a sharded one: the local part), and the modelled KL, Tensor [].

        The next call overwrites the returned tensors.

        Raises:
            KeyError: a parameter that changes a layer is not in ``parameters``.
        """
        values = {**self._frozen, **parameters}
        pulls: list[Pull] = []
        drifts = []
        with torch.autocast(self._groups[0].floor.device.type, enabled=False):
            for group in self._groups:
                found, drift = _pull(group, values)
                pulls += found
                drifts.append(drift)
        return self._rows.update(pulls, values), torch.cat(drifts).sum()


def _pull(group: _Group, parameters: Mapping[str, Tensor]) -> tuple[list[Pull], Tensor]:
    """Return the pulls on the parameters of a group, and the modelled KL [layers]."""
    inputs, outputs = group.inputs.to(dtype=torch.float32), group.outputs.to(dtype=torch.float32)
    adapters = list(zip(*(bound.adapters for bound in group.layers), strict=True))
    names = [([a for a, *_ in each], [b for _, b, *_ in each]) for each in adapters]
    shapes = [(rank, scale) for (_, _, rank, scale), *_ in adapters]
    rights = [_stacked_values(parameters, a) for a, _ in names]
    lefts = [_stacked_values(parameters, b) * scale for (_, b), (_, scale) in zip(names, shapes, strict=True)]
    if group.fixed is not None:
        lefts.append(group.fixed[0])
        rights.append(group.fixed[1])
    if group.layers[0].weight is None:
        left, right = torch.cat(lefts, -1), torch.cat(rights, -2)
        pulls, drift = adapter_pull(inputs, outputs, group.floor, left, right, shapes)
    else:
        delta = torch.stack([_weight_change(bound, parameters) for bound in group.layers])
        if lefts:
            delta = delta + torch.cat(lefts, -1) @ torch.cat(rights, -2)
        weight, drift = weight_pull(inputs, outputs, group.floor, delta)
        # The left factor includes the scale.
        pulls = [
            (left.mT @ weight, scale * (weight @ right.mT))
            for (_, scale), left, right in zip(shapes, lefts, rights, strict=False)
        ]
    found: list[Pull] = []
    for (a, b), (a_pull, b_pull) in zip(names, pulls, strict=True):
        found += [(a, a_pull), (b, b_pull)]
    if group.layers[0].weight is not None:
        trained = [str(bound.weight) for bound in group.layers]
        found.append((trained, weight.mT if group.layers[0].transposed else weight))
    return found, drift


def _stacked_values(parameters: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return parameters of one shape as one tensor, float32. A DTensor is gathered, as FSDP does in a forward pass."""
    return torch.stack([full(parameters[name]) for name in names]).float()


def _weight_change(bound: _BoundLayer, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the change of a trained weight, [out, in]."""
    assert bound.weight is not None
    assert bound.start is not None
    now = parameters[bound.weight].detach()
    part = local(now).float() - to_layout(bound.start, now).to(now.device, torch.float32)
    delta = full(as_dtensor(part, now))
    return delta.T if bound.transposed else delta


def _whole(parameter: Tensor) -> Tensor:
    """Return the whole parameter in float32. A DTensor is gathered, as FSDP does in each forward pass."""
    return full(parameter.detach()).float()


def _bind_layer(
    layer: Layer,
    factors: LayerFactors,
    names: Mapping[int, str],
    earlier: Sequence[Tensor],
    frozen: dict[str, Tensor],
) -> _BoundLayer:
    """Return a layer of the binding. Add the frozen matrices of its trained adapters to ``frozen``."""
    trained, fixed = [], []
    for adapter in layer.adapters:
        if adapter.a.requires_grad or adapter.b.requires_grad:
            a, b = names[id(adapter.a)], names[id(adapter.b)]
            trained.append((a, b, int(adapter.a.shape[0]), adapter.scale))
            frozen |= {names[id(p)]: _whole(p).clone() for p in (adapter.a, adapter.b) if not p.requires_grad}
        elif bool(adapter.b.any()):
            fixed.append((_whole(adapter.b) * adapter.scale, _whole(adapter.a)))
    if factors.anchor is not None:
        fixed.append((-factors.anchor[0], factors.anchor[1]))
    device = layer.weight.device
    product = None
    if fixed:
        product = torch.cat([b.to(device) for b, _ in fixed], 1), torch.cat([a.to(device) for _, a in fixed])
    weight = names[id(layer.weight)] if layer.trained else None
    if trained and weight is None:
        _check_base_weight(layer, factors.weight)
    start = _captured(layer, factors.weight, earlier) if layer.trained else None
    return _BoundLayer(layer.name, layer.transposed, tuple(trained), product, weight, start)


def _check_base_weight(layer: Layer, stored: Tensor | None) -> None:
    """Raise if the frozen weight under a trained adapter differs from the captured one beyond storage in 16 bits."""
    found = None if stored is None else sample_of(layer)
    if stored is None or found is None:
        return
    if len(stored) != len(found) or not torch.allclose(stored.double(), found.double(), RELATIVE, ABSOLUTE):
        raise ValueError(
            f"the weight of {layer.name} under the adapter is not the weight at capture: the model is another one, an "
            "adapter was merged into it, or the adapter's start changed it (PiSSA, OLoRA, ...). Capture a source with "
            "this model and its adapter"
        )


def _captured(layer: Layer, stored: Tensor | None, earlier: Sequence[Tensor]) -> Tensor:
    """Return the captured weight: the present one, or the start of an earlier binding, whichever fits the sample.

    Raises:
        ValueError: none of them fits.
    """
    now = layer.weight.detach()
    if stored is None:
        return earlier[0] if earlier else now.clone()
    differences = []
    for weight in (now, *earlier):
        found = sample_of(layer, weight)
        differences.append(len(stored) if found is None else count_differences(stored, found))
        if differences[-1] == 0:
            return weight.clone() if weight is now else weight
    raise ValueError(
        f"the weight of {layer.name} is trained, and it is not the weight at capture: {differences[0]} of "
        f"{len(stored)} compared elements differ. Its pull is relative to the captured weight. Create GradGuide while "
        "the model has the captured weights, and load trained weights afterwards; or capture a source with this model"
    )


def _stack_group(bounds: list[_BoundLayer], layers: Mapping[str, LayerFactors], floor: float) -> _Group:
    entries = [layers[bound.name] for bound in bounds]
    fixed = [bound.fixed for bound in bounds if bound.fixed is not None]
    return _Group(
        bounds,
        stacked([entry.inputs for entry in entries]),
        stacked([entry.outputs for entry in entries]),
        torch.tensor([floor / entry.scale if entry.scale > 0 else 0.0 for entry in entries]),
        (torch.stack([left for left, _ in fixed]), torch.stack([right for _, right in fixed])) if fixed else None,
    )
