"""Find the linear layers of a model by the base model's names, and the adapters that change them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.distributed.layouts import layout_of
from gradguide.sources.structured.packed import packed_note
from gradguide.utils.names import model_modules

__all__ = [
    "MOVING_STARTS", "Adapter", "Layer", "active_adapters", "adapter_configs", "anchor_of", "base_name", "find_layers",
    "select",
]  # fmt: skip

_PEFT_PREFIX = "base_model.model."
# PEFT trains a copy of a module in ``modules_to_save``: the copy is modules_to_save.ADAPTER, next to original_module.
_SAVED = re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.|$)")
# Variants of LoRA whose change of the weight is ``scale * B @ A``; they differ in the start or in the backward pass.
_PLAIN = ("MiCA", "Monteclora", "Velora")
# PEFT's wrapper that trains some rows of an embedding, and of a head that is tied to it. These rows have no pull.
_TOKENS = "TrainableTokensLayer"
# Values of ``init_lora_weights`` for which PEFT changes the weight, so that the model is the same with B A not zero.
MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of one layer: it adds ``scale * B @ A`` to the weight.

    a, b: the parameters, [r, in] and [out, r].
    name: the adapter's name.
    scalings: the scale of each adapter of the layer, which PEFT changes in place.
    start: PEFT's ``init_lora_weights``, "" if it is not known.
    """

    a: Tensor
    b: Tensor
    name: str
    scalings: Mapping[str, float]
    start: str = ""

    @property
    def scale(self) -> float:
        """The present scale."""
        return float(self.scalings[self.name])

    @property
    def moves_weight(self) -> bool:
        """Return whether PEFT changed the weight when it initialised the adapter."""
        return self.start.startswith(MOVING_STARTS)


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer.

    name: name in the base model, such as ``model.layers.0.self_attn.q_proj``.
    module: the module to hook: PEFT's wrapper if there is one, else the layer itself.
    linear: the layer that holds the weight.
    transposed: whether the weight is stored as [in, out], as in GPT-2's Conv1D.
    adapters: active LoRA adapters.
    """

    name: str
    module: nn.Module
    linear: nn.Module
    transposed: bool
    adapters: tuple[Adapter, ...]

    @property
    def weight(self) -> Tensor:
        """The weight as stored."""
        weight: Tensor = self.linear.weight  # type: ignore[assignment]
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs. They are not read from the weight, because quantised weights are packed."""
        linear: Any = self.linear
        if self.transposed:
            return int(linear.weight.shape[1]), int(linear.weight.shape[0])
        return int(linear.out_features), int(linear.in_features)

    @property
    def quantised(self) -> bool:
        """Return whether the weight cannot be compared: it is packed, in 8 bits, or of a frozen tensor subclass."""
        weight, (outputs, inputs) = self.weight, self.shape
        plain = type(weight) in (Tensor, nn.Parameter) or weight.requires_grad or layout_of(weight) is not None
        packed = not weight.is_floating_point() or weight.element_size() == 1 or weight.numel() != outputs * inputs
        return packed or not plain

    @property
    def trained(self) -> bool:
        """Whether the weight itself is trained."""
        return self.weight.requires_grad

    @property
    def adapted(self) -> bool:
        """Whether an active adapter is trained."""
        return any(adapter.a.requires_grad or adapter.b.requires_grad for adapter in self.adapters)


def base_name(name: str) -> str:
    """Return the name in the base model of a module or parameter of a PEFT model, given its canonical name."""
    name = _SAVED.sub("", name.replace(_PEFT_PREFIX, ""))
    return ".".join(part for part in name.split(".") if part != "base_layer")


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Return all linear layers of ``model`` by the base model's name, in the model's order.

    Raises:
        ValueError: an active adapter is not LoRA (but DoRA, KaSA, IA3, LoHa, ...), or a layer has adapters of several
            methods: its change of the weight is not ``scale * B @ A``. An active adapter is merged into the weight.
    """
    found: dict[str, Layer] = {}
    inside: set[int] = set()
    starts = {name: str(getattr(config, "init_lora_weights", "")) for name, config in adapter_configs(model).items()}
    for wrapped, module in model_modules(model):
        if id(module) in inside:
            continue
        name = base_name(wrapped)
        inside.update(id(each) for copy in _unused(module) for each in copy.modules())
        base: Any = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            if isinstance(getattr(base, "base_layer", None), nn.Module):
                _check_nested(name, module)
                # The wrapper's own matrices are no layers. Those in its base layer may be.
                inside |= set(map(id, module.modules())) - set(map(id, base.modules()))
                continue
            inside.update(map(id, module.modules()))
            linear = _is_linear(base) and type(module).__name__ != _TOKENS
            layer = _adapted(name, module, base, starts) if linear else None
        else:
            layer = Layer(name, module, module, _is_conv1d(module), ()) if _is_linear(module) else None
        if layer is not None and found.setdefault(name, layer) is not layer:
            raise ValueError(f"two linear layers are called {name!r} without the prefixes of wrappers: rename one")
    return found


def select(model: nn.Module, layers: dict[str, Layer], modules: str | Sequence[str] | None) -> list[Layer]:
    """Return the layers to capture, in the model's order.

    Args:
        modules: names, suffixes of names (``q_proj``) or patterns (``*.mlp.*``). None selects every trained or adapted
            layer, or, if nothing is trained, every layer except the language head. Beside quantised layers only
            adapters count as trained: a quantised model is loaded with other weights that require a gradient.

    Raises:
        ValueError: there is no linear layer, ``modules`` is empty, or no layer matches an entry of it.
    """
    note = packed_note(model)
    if not layers or (note and modules is None):
        which = f"{len(layers)} linear layers that can be captured" if layers else "no linear layer to capture"
        raise ValueError(f"{type(model).__name__} has {which}{note}")
    if modules is not None:
        patterns = [modules] if isinstance(modules, str) else list(modules)
        if not patterns:
            raise ValueError("modules must name at least one layer, found none; None selects the default")
        chosen: dict[str, Layer] = {}
        for pattern in patterns:
            matching = {n: layer for n, layer in layers.items() if _matches(n, pattern)}
            if not matching:
                some = ", ".join(list(layers)[:3])
                raise ValueError(f"no linear layer is called {pattern!r}; the model has {len(layers)}, as {some}{note}")
            chosen.update(matching)
        return [layer for name, layer in layers.items() if name in chosen]
    body = [layer for layer in layers.values() if not _is_head(model, layer)]
    trained = [layer for layer in layers.values() if layer.trained or layer.adapted]
    if any(layer.quantised for layer in body) and not any(layer.adapted for layer in trained):
        return body
    return [layer for layer in trained if layer in body] or trained or body or list(layers.values())


def anchor_of(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """Return the active adapters' change of the weight as a product on the CPU, ([out, R], [R, in]); None if zero."""
    if not layer.adapters:
        return None
    left = torch.cat([adapter.b.detach().float() * adapter.scale for adapter in layer.adapters], dim=1)
    right = torch.cat([adapter.a.detach().float() for adapter in layer.adapters])
    return (left.cpu(), right.cpu()) if bool(left.any()) and bool(right.any()) else None


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Return the configuration of each of PEFT's adapters in a model, by the adapter's name."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    return {name: config for each in found if isinstance(each, Mapping) for name, config in each.items()}


def _adapted(name: str, module: nn.Module, base: nn.Module, starts: Mapping[str, str]) -> Layer:
    active = active_adapters(module)
    wrapper: Any = module
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
        if active:
            raise ValueError(
                f"{name} has an adapter of kind {_kind(module)} ({type(module).__name__}); a structured source takes "
                "LoRA and whole weights. Use SourceGradient.anchored() for it, or merge it into the weights if it is "
                "not trained"
            )
        return Layer(name, module, base, _is_conv1d(base), ())
    adapters = []
    for adapter in (each for each in active if each in wrapper.lora_A):
        if adapter in (getattr(wrapper, "merged_adapters", None) or ()):
            raise ValueError(
                f"the adapter {adapter!r} is merged into the weight of {name}, so the weight is not that of the base "
                "model: call unmerge_adapter() on the PEFT model first, or merge_and_unload() to make it a base model"
            )
        if (variant := _variant(wrapper, adapter)) is not None:
            raise ValueError(
                f"{name} has an adapter of kind {variant} ({adapter!r}), whose change of the weight is not scale * B @ "
                "A; use plain LoRA, or SourceGradient.anchored()"
            )
        a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        adapters.append(Adapter(a, b, adapter, wrapper.scaling, starts.get(adapter, "")))
    return Layer(name, module, base, _is_conv1d(base), tuple(adapters))


def _check_nested(name: str, module: nn.Module) -> None:
    """Raise if a wrapper of an adapted layer, as in PEFT's mixed models, has another active adapter."""
    # Wrappers of several parameters of a module (``target_parameters``) are nested too. They are no linear layers.
    if active_adapters(module) and type(module).__name__ != "ParamWrapper":
        raise ValueError(
            f"{name} has adapters of several kinds ({_kind(module)}, {_kind(module.base_layer)}), whose change of the "
            "weight is not scale * B @ A; use plain LoRA, or SourceGradient.anchored()"
        )


def _kind(module: Any) -> str:
    """Return the name of the method that a module of PEFT belongs to, such as "loha"."""
    return str(type(module).__module__.split(".")[-2])


def _variant(wrapper: Any, adapter: str) -> str | None:
    """Return the variant of LoRA of an adapter, such as "DoRA" or "Kasa"; None if it changes the weight as LoRA."""
    # X-LoRA scales the adapters by a function of the input. It replaces the forward method of PEFT's layer.
    if type(getattr(wrapper.forward, "__self__", wrapper)).__name__.startswith("XLora"):
        return "X-LoRA"
    if getattr(wrapper, "use_dora", {}).get(adapter, False):
        return "DoRA"
    variants: Any = getattr(wrapper, "lora_variant", {})
    kind = type(variants[adapter]).__name__ if adapter in variants else ""
    return None if not kind or kind.startswith(_PLAIN) else kind.removesuffix("LinearVariant")


def active_adapters(module: nn.Module) -> list[str]:
    """Return the adapters that a module of PEFT uses, none while they are disabled."""
    if getattr(module, "disable_adapters", None) is True:
        return []
    active: Any = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", ())
    return [active] if isinstance(active, str) else list(active)


def _unused(module: nn.Module) -> list[nn.Module]:
    """Return the modules in a wrapper for ``modules_to_save`` that its forward pass does not use."""
    original, copies = getattr(module, "original_module", None), getattr(module, "modules_to_save", None)
    if not isinstance(original, nn.Module) or not isinstance(copies, nn.ModuleDict):
        return []
    active = active_adapters(module)
    used = copies[active[0]] if active and all(adapter in copies for adapter in active) else original
    return [each for each in (original, *copies.values()) if each is not used]


def _is_linear(module: nn.Module) -> bool:
    # Subclasses that compute something else: Llama 4 routers choose experts, grouped layers split their input.
    other = type(module).__name__.endswith(("Router", "GroupedLinear"))
    return (isinstance(module, nn.Linear) and not other) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # By name, to avoid an import of transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def _is_head(model: nn.Module, layer: Layer) -> bool:
    """Return whether the layer is the language head: the output embedding, or tied to an input embedding."""
    for module in model.modules():  # the language model may be inside wrappers
        if isinstance(module, nn.Embedding) and module.weight is layer.weight:
            return True
        get: Any = getattr(module, "get_output_embeddings", None)
        try:
            head = get() if callable(get) else None
        except (AttributeError, NotImplementedError, TypeError):
            head = None
        if isinstance(head, nn.Module) and any(each is layer.linear for each in head.modules()):
            return True
    return False


def _matches(name: str, pattern: str) -> bool:
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or re.search(rf"(^|\.){re.escape(pattern)}$", name) is not None
