"""Find the parameters that change one layer of a source, and the weight that it had at capture."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradguide.sources.base_model import ABSOLUTE, RELATIVE
from gradguide.sources.structured.captured_weight import count_differences, sample_of
from gradguide.sources.structured.factors import LayerFactors, Product
from gradguide.sources.structured.layers import Layer

__all__ = ["BoundLayer", "bind_layer", "names_that_change", "names_to_pull"]


@dataclass(frozen=True, slots=True)
class BoundLayer:
    """The names of the parameters that change a layer.

    adapters: names of A and B, rank and scale, of each active adapter, also of frozen ones.
    fixed: the constant part of D: minus the source's anchor.
    weight, start: name and captured values of the weight, if the weight itself is trained. If the weight is sharded,
        start is sharded in the same way.
    device: device of the weight when the layer was bound. Layers of several devices are computed apart.
    scales: for each adapter of the layer its name, the scales of the layer's adapters, and its own when it was bound.
    """

    name: str
    transposed: bool
    adapters: tuple[tuple[str, str, int, float], ...]
    fixed: Product | None
    weight: str | None
    start: Tensor | None
    device: torch.device
    scales: tuple[tuple[str, Mapping[str, float], float], ...]

    @property
    def names(self) -> list[str]:
        """Names of the parameters that the pull is computed from."""
        return [name for a, b, _, _ in self.adapters for name in (a, b)] + ([self.weight] if self.weight else [])

    def pulled(self, values: Mapping[str, Tensor]) -> list[str]:
        """Return the name of a trained weight, and the names of A and B of each adapter with a trained matrix."""
        adapters = [
            name for a, b, *_ in self.adapters for name in (a, b) if any(values[n].requires_grad for n in (a, b))
        ]
        return [*adapters, *([self.weight] if self.weight else [])]

    @property
    def kind(self) -> tuple[object, ...]:
        """Key of the layer: layers with equal key and shape are computed together.

        Each layer with a trained weight is computed alone, so that one whole weight is gathered at a time. Layers may
        share a weight, so the key has the layer's name.
        """
        ranks = tuple((rank, scale) for _, _, rank, scale in self.adapters)
        fixed = None if self.fixed is None else self.fixed[0].shape[1]
        return self.device, ranks, fixed, self.weight and self.name, self.transposed


def bind_layer(
    layer: Layer,
    factors: LayerFactors,
    names: Mapping[int, str],
    earlier: Sequence[Tensor],
    values: dict[str, Tensor],
) -> BoundLayer:
    """Return a layer of the binding. Add the parameters that its pull is computed from to ``values``."""
    adapters = []
    for adapter in layer.adapters:
        a, b = names[id(adapter.a)], names[id(adapter.b)]
        adapters.append((a, b, int(adapter.a.shape[0]), adapter.scale))
        values |= {a: adapter.a, b: adapter.b}
    device = layer.weight.device
    fixed = None
    if factors.anchor is not None:
        fixed = -factors.anchor[0].to(device), factors.anchor[1].to(device)
    weight = names[id(layer.weight)] if layer.trained else None
    if weight is not None:
        values[weight] = layer.weight
    if layer.adapted and weight is None:
        _check_base_weight(layer, factors)
    start = _captured(layer, factors.weight, earlier) if layer.trained else None
    scales = tuple((adapter.name, adapter.scalings, adapter.scale) for adapter in layer.adapters)
    return BoundLayer(layer.name, layer.transposed, tuple(adapters), fixed, weight, start, device, scales)


def names_that_change(layer: Layer, names: Mapping[int, str]) -> set[str]:
    """Return the names of all parameters that can change a weight: itself, and adapters, also inactive ones."""
    parts = [getattr(layer.module, kind, None) for kind in ("lora_A", "lora_B")]
    # B may have a bias (LoraConfig(lora_bias=True)), which has no pull, as any bias.
    matrices = [part.weight for each in parts if isinstance(each, nn.ModuleDict) for part in each.values()]
    return {names[id(p)] for p in (layer.weight, *matrices) if id(p) in names}


def names_to_pull(layer: Layer, names: Mapping[int, str], given: Container[str] | None) -> set[str]:
    """Return the names of the trained parameters that change a layer; none if none of them is in ``given``.

    Raises:
        ValueError: some are in ``given`` and others are not. The weight is computed from parameters in ``given``.
    """
    weight = layer.weight
    if weight.requires_grad and id(weight) not in names:  # of torch.nn.utils.parametrize, or of weight_norm
        parameters = layer.linear.named_parameters()
        origins = {names[id(p)] for name, p in parameters if p.requires_grad and name != "bias"}
        if found := sorted(origins if given is None else (name for name in origins if name in given)):
            raise ValueError(
                f"the weight of {layer.name} is computed from {found[0]}, so it cannot be pulled: remove the "
                "parametrization, or capture a source without this layer (modules=)"
            )
        return set()
    parts = (weight, *(p for adapter in layer.adapters for p in (adapter.a, adapter.b)))
    moved = {names[id(p)] for p in parts if p.requires_grad}
    other = sorted(moved) if given is None else sorted(name for name in moved if name not in given)
    if given is None or not other:
        return moved
    if len(other) < len(moved):
        raise ValueError(
            f"{layer.name} is changed by {min(moved - set(other))} and by {other[0]}, which is trained but is not a "
            "named parameter of this optimizer: give both to the optimizer and to names, or freeze it before"
        )
    return set()


def _check_base_weight(layer: Layer, factors: LayerFactors) -> None:
    """Raise if the frozen weight under a trained adapter differs from the captured one beyond storage in 16 bits.

    A quantised weight cannot be compared. Then the start of the adapter must not have changed it.
    """
    stored = factors.weight
    found = None if stored is None else sample_of(layer)
    if stored is None or found is None:
        moving = [adapter for adapter in layer.adapters if adapter.moves_weight]
        if moving and factors.anchor is None:
            raise ValueError(
                f"the adapter {moving[0].name!r} has init_lora_weights={moving[0].start!r}, which changed the weight "
                f"of {layer.name}. It cannot be compared with the one at capture, because one of them is quantised or "
                "the source has no base model: capture a source with this model and its adapter"
            )
        return
    if len(stored) != len(found) or not torch.allclose(stored.double(), found.double(), RELATIVE, ABSOLUTE):
        raise ValueError(
            f"the weight of {layer.name} under the adapter is not the weight at capture: the model is another one, an "
            "adapter was merged into it, or the adapter's start changed it (PiSSA, OLoRA, ...). Capture a source with "
            "this model and its adapter"
        )


def _captured(layer: Layer, stored: Tensor | None, earlier: Sequence[Tensor]) -> Tensor:
    """Return the captured weight: the start of an earlier binding, or the present one, the first that fits the sample.

    Raises:
        ValueError: none of them fits.
    """
    now = layer.weight.detach()
    if stored is None:
        return earlier[0] if earlier else now.clone()
    for weight in (*earlier, now):  # an earlier start is shared, not copied
        found = sample_of(layer, weight)
        different = len(stored) if found is None else count_differences(stored, found)
        if different == 0:
            return weight.clone() if weight is now else weight
    raise ValueError(
        f"the weight of {layer.name} is trained, and it is not the weight at capture: {different} of "
        f"{len(stored)} compared elements differ. Its pull is relative to the captured weight. Create GradGuide while "
        "the model has the captured weights, and load trained weights afterwards; or capture a source with this model. "
        "If the layer is a new head, leave it out of the source with modules="
    )
