"""LoRA parameters of a PEFT model, by name and by layer."""

from __future__ import annotations

from torch import Tensor, nn

from gradguide.utils.names import NamedParameters, adapter_of, model_names, module_of

__all__ = ["lora_parameters", "lora_scopes"]


def lora_parameters(model: nn.Module, adapter: str | None = None) -> NamedParameters:
    """Return (name, parameter) of every trainable LoRA parameter, in the model's order.

    It is a list for ``names=`` of :class:`gradguide.GradGuide` and of :meth:`gradguide.SourceGradient.capture`. Heads
    that PEFT trains beside the adapter (``modules_to_save``) are not in it. The list refers to the model, so that a
    source can compare its base model with this one.

    Adapters that are frozen or not active take no part; call it again after adding or unfreezing one.

    Args:
        model: a PEFT model, or a module that holds one.
        adapter: only parameters of the adapter of this name; None takes all.

    Raises:
        ValueError: there is none.
    """
    trained = {name: p for name, p in model_names(model).items() if isinstance(p, nn.Parameter) and p.requires_grad}
    found = [
        (name, p)
        for name, p in trained.items()
        if any(part.startswith("lora_") for part in name.split(".")) and adapter in (None, adapter_of(name))
    ]
    if not found:
        which = "LoRA parameter" if adapter is None else f"LoRA parameter of adapter {adapter!r}"
        raise ValueError(
            f"the model has no trainable {which}: add an adapter with peft.get_peft_model, or unfreeze one with "
            "model.set_adapter(name)"
        )
    return NamedParameters(found, model)


def lora_scopes(model: nn.Module) -> dict[Tensor, str]:
    """Return the label of every trainable LoRA parameter: A and B of one layer share one.

    It is a mapping for ``scope=`` of :class:`gradguide.GradGuide`.

    Raises:
        ValueError: there is none.
    """
    return {parameter: module_of(name) for name, parameter in lora_parameters(model)}
