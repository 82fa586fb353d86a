"""Find the LoRA parameters of a PEFT model, by name and by layer."""

from __future__ import annotations

from torch import Tensor, nn

from gradguide.utils.names import NamedParameters, adapter_of, model_names, module_of

__all__ = ["lora_parameters", "lora_scopes"]


def lora_parameters(model: nn.Module, adapter: str | None = None) -> NamedParameters:
    """Return (name, parameter) of every trainable LoRA parameter, in the model's order.

    Pass the list as ``names=`` to :class:`gradguide.GradGuide` and :meth:`gradguide.SourceGradient.capture`. It
    excludes heads that PEFT trains in addition to the adapter (``modules_to_save``). The list has a weak reference to
    the model, so that a source can compare its base model with this one.

    Frozen and inactive adapters are not included. Call the function again after adding or unfreezing one.

    Args:
        model: a PEFT model, or a module that contains one.
        adapter: name of the adapter to select; None selects all.

    Raises:
        ValueError: there is no such parameter.
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
    """Return a scope label for every trainable LoRA parameter. A and B of one layer have the same label.

    Pass the mapping as ``scope=`` to :class:`gradguide.GradGuide`.

    Raises:
        ValueError: there is no such parameter.
    """
    return {parameter: module_of(name) for name, parameter in lora_parameters(model)}
