"""Bind a source to the parameters of a model that change its layers, and compute the pull on them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import as_dtensor, full, local, to_layout
from gradguide.ops.tensors import common_value
from gradguide.sources.structured.bound_layer import BoundLayer, bind_layer, names_that_change, names_to_pull
from gradguide.sources.structured.factors import Factor, LayerFactors, Product, stacked
from gradguide.sources.structured.layers import active_adapters, find_layers
from gradguide.sources.structured.packed import packed_note
from gradguide.sources.structured.pull import adapter_pull, weight_pull
from gradguide.sources.structured.pull_rows import Pull, PullRows
from gradguide.utils.names import model_names

__all__ = ["Binding"]


@dataclass(slots=True)
class _Group:
    """Layers with equal kind and shape, and their stacked factors: [K * layers, ...], see ``adapter_pull``."""

    layers: list[BoundLayer]
    inputs: Factor
    outputs: Factor
    floor: Tensor
    fixed: Product | None

    def move(self, device: torch.device) -> None:
        """Move the factors to ``device``."""
        if self.floor.device == device:
            return
        self.inputs, self.outputs, self.floor = self.inputs.to(device), self.outputs.to(device), self.floor.to(device)
        if self.fixed is not None:
            self.fixed = self.fixed[0].to(device), self.fixed[1].to(device)


class Binding:
    """The parameters of one model that change the layers of a source.

    It references parameters, so it is copied and pickled together with the optimizer. A parameter that is frozen later
    keeps its part of the change.

    Factors are whole on every rank. A pull needs one gather of each sharded parameter (DTensor) that changes a layer:
    all adapter matrices, or one weight at a time. Each rank computes the whole pull and keeps its own part.

    Args:
        model: a model with adapters of any rank, initialisation and name, or with trained weights.
        layers: the factors of each layer.
        floor (float): ``floor / E|y|^2`` is added to the diagonal of G for the pull, y being the layer's outputs.
        earlier: bindings to the same model from before its weights were trained.
        given: names of the parameters to pull; None means all parameters. Layers without any are left out.

    Raises:
        ValueError: a layer has another shape than in the source, a trained weight differs from the captured one, or no
            trained parameter changes any layer. A layer has trained parameters in ``given`` and others that are not.

    Warns:
        UserWarning: the captured weight of a trained layer is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LayerFactors],
        floor: float,
        earlier: Sequence[Binding] = (),
        given: Container[str] | None = None,
    ) -> None:
        starts = [start for binding in earlier for start in binding._starts]
        self._values: dict[str, Tensor] = {}
        self._unbound: set[str] = set()
        names = {id(p): name for name, p in model_names(model).items()}
        # Weak references: the optimizer neither copies nor keeps the model.
        self._adapted: list[tuple[str, weakref.ref[nn.Module], set[str]]] = []
        kinds: dict[tuple[object, ...], list[BoundLayer]] = {}
        for name, layer in find_layers(model).items():
            if name not in layers:
                continue
            shape = layers[name].shape
            moved = names_to_pull(layer, names, given)
            self._unbound |= names_that_change(layer, names) - moved
            if moved:
                if layer.shape != shape:
                    raise ValueError(
                        f"layer {name} has shape {layer.shape}, the source has {shape}: it was captured from another "
                        "model, or the layer is a new head. Capture a source without that layer (modules=), or leave "
                        "it out of names, as names=lora_parameters(model) does"
                    )
                own = [start for owner, start in starts if owner == name]
                bound = bind_layer(layer, layers[name], names, own, self._values)
                kinds.setdefault((*shape, layers[name].pairs, *bound.kind), []).append(bound)
                held = {adapter.name for adapter in layer.adapters}
                self._adapted.append((name, weakref.ref(layer.module), held))
        self.names = frozenset(
            name for bounds in kinds.values() for bound in bounds for name in bound.pulled(self._values)
        )
        """Names of the parameters that were trained when the binding was made, and the other half of their adapters."""
        self._unbound -= self.names
        if not kinds:
            raise ValueError(
                f"no trained parameter of the model changes one of the source's {len(layers)} layers, such as "
                f"{next(iter(layers))} (the model's first is {next(iter(find_layers(model)), 'none')}): add or "
                "enable an adapter, unfreeze weights, or capture the layers that are trained. If the captured model is "
                f"inside another module, pass that model itself as names{packed_note(model)}"
            )
        self._groups = [_stack_group(bounds, layers, floor) for bounds in kinds.values()]
        self._scales = [
            (bound.name, *scale) for group in self._groups for bound in group.layers for scale in bound.scales
        ]
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

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_adapted": []}  # a copy has no model

    @property
    def _starts(self) -> list[tuple[str, Tensor]]:
        """The captured weight by layer, for layers whose weight is trained."""
        bounds = [bound for group in self._groups for bound in group.layers]
        return [(bound.name, bound.start) for bound in bounds if bound.start is not None]

    @torch.no_grad()
    def pull(self, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the pull on each parameter by name (of a sharded one: the local part), and the modelled KL, Tensor [].

        The next call overwrites the returned tensors.

        Args:
            parameters: the trained parameters by name.

        Raises:
            RuntimeError: a parameter that changes a layer was frozen or inactive when the binding was made, or the
                scale of an adapter changed since, or an adapter became active or inactive.
        """
        self._check_scales()
        if not self._unbound.isdisjoint(parameters):
            raise RuntimeError(
                f"{min(self._unbound & parameters.keys())} is trained, but it was frozen or in an inactive adapter "
                "when the source was given to GradGuide, so it has no pull: call set_alignment with the sources after "
                "unfreezing parameters or changing adapters"
            )
        self._check_active()
        self._values.update((name, p) for name, p in parameters.items() if name in self._values)
        values = self._values
        pulls: list[Pull] = []
        drifts = []
        for group in self._groups:
            moved = (values[n] for bound in group.layers for n in bound.names if n in parameters)
            group.move(next(moved, group.floor).device)
            with torch.autocast(group.floor.device.type, enabled=False):
                found, drift = _pull(group, values)
            pulls += found
            drifts.append(drift)
        device = drifts[0].device
        return self._rows.update(pulls, values), torch.cat([drift.to(device) for drift in drifts]).sum()

    def _check_scales(self) -> None:
        """Raise RuntimeError if the scale of an adapter changed: D is computed with that at binding."""
        for layer, name, scalings, scale in self._scales:
            now = scalings.get(name)
            if now != scale:
                changed = f"changed from {scale} to {now}" if now is not None else "is gone: it was deleted"
                raise RuntimeError(
                    f"the scale of the adapter {name!r} at {layer} {changed}, after the source was given to GradGuide: "
                    "call set_alignment with the sources again"
                )

    def _check_active(self) -> None:
        """Raise RuntimeError if an adapter became active or inactive: D has the part of those at binding."""
        for layer, module, held in self._adapted:
            if (found := module()) is None:
                continue
            there: Any = getattr(found, "lora_A", ())
            active = {name for name in active_adapters(found) if name in there}
            if active != held:
                raise RuntimeError(
                    f"the active adapters at {layer} changed from {sorted(held)} to {sorted(active)} after the source "
                    "was given to GradGuide: call set_alignment with the sources again"
                )


def _pull(group: _Group, parameters: Mapping[str, Tensor]) -> tuple[list[Pull], Tensor]:
    """Return the pulls on the parameters of a group, and the modelled KL by pair and layer."""
    inputs, outputs = group.inputs.to(dtype=torch.float32), group.outputs.to(dtype=torch.float32)
    adapters = list(zip(*(bound.adapters for bound in group.layers), strict=True))
    names = [([a for a, *_ in each], [b for _, b, *_ in each]) for each in adapters]
    shapes = [(rank, scale) for (_, _, rank, scale), *_ in adapters]
    device = group.floor.device
    rights = [_stacked_values(parameters, a, device) for a, _ in names]
    lefts = [_stacked_values(parameters, b, device) * scale for (_, b), (_, scale) in zip(names, shapes, strict=True)]
    if group.fixed is not None:
        lefts.append(group.fixed[0])
        rights.append(group.fixed[1])
    if group.layers[0].weight is None:
        left = lefts[0] if len(lefts) == 1 else torch.cat(lefts, -1)
        right = rights[0] if len(rights) == 1 else torch.cat(rights, -2)
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


def _stacked_values(parameters: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> Tensor:
    """Return parameters of one shape as one tensor, float32. A DTensor is gathered, as FSDP does in a forward pass."""
    tensors = [full(parameters[name]) for name in names]
    if common_value(map(Tensor.get_device, tensors)) != (-1 if device.type == "cpu" else device.index):
        # A parameter that was frozen before the model moved is on its earlier device.
        tensors = [tensor.to(device) for tensor in tensors]
    return torch.stack(tensors).float()


def _weight_change(bound: BoundLayer, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the change of a trained weight, [out, in]."""
    assert bound.weight is not None
    assert bound.start is not None
    now = parameters[bound.weight].detach()
    part = local(now).float() - to_layout(bound.start, now).to(now.device, torch.float32)
    delta = full(as_dtensor(part, now))
    return delta.T if bound.transposed else delta


def _stack_group(bounds: list[BoundLayer], layers: Mapping[str, LayerFactors], floor: float) -> _Group:
    entries = [layers[bound.name] for bound in bounds]
    fixed = [bound.fixed for bound in bounds if bound.fixed is not None]
    floors = torch.tensor([floor / entry.scale if entry.scale > 0 else 0.0 for entry in entries])
    return _Group(
        bounds,
        stacked([entry.inputs for entry in entries], dim=1).flat(),
        stacked([entry.outputs for entry in entries], dim=1).flat(),
        floors.repeat(entries[0].pairs)[:, None, None],
        (torch.stack([left for left, _ in fixed]), torch.stack([right for _, right in fixed])) if fixed else None,
    )
