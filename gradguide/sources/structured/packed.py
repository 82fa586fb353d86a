"""Name linear layers of quantisers that a structured source cannot take, such as those of GPTQ, AWQ and HQQ."""

from __future__ import annotations

from torch import Tensor, nn

from gradguide.utils.names import model_modules

__all__ = ["packed_note"]


def packed_note(model: nn.Module) -> str:
    """Return a sentence for errors about layers that were not found; "" if the model has no packed ones."""
    found = [(name, type(module).__name__) for name, module in model_modules(model) if _is_packed(module)]
    if not found:
        return ""
    name, kind = found[0]
    return (
        f". {len(found)} linear layers are packed by a quantiser such as GPTQ, AWQ or HQQ, and no nn.Linear (first: "
        f"{name}, a {kind}), so structured sources leave them out. Quantise with bitsandbytes or torchao, whose layers "
        "are nn.Linear, or use SourceGradient.anchored()"
    )


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module has the sizes of a linear layer, but neither a floating-point weight nor parts."""
    weight, parts = getattr(module, "weight", None), any(True for _ in module.children())
    sized = any(isinstance(getattr(module, size, None), int) for size in ("in_features", "infeatures"))
    plain = isinstance(weight, Tensor) and weight.is_floating_point()
    return sized and not parts and not plain and not isinstance(module, nn.Linear)
