"""Checks that an optimizer can be wrapped, with an error message for each unsupported case."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Adam, AdamW, Optimizer
from torch.optim import optimizer as hooks

from gradguide.distributed.deepspeed import check_zero
from gradguide.distributed.layouts import check_divided, local, on_any_rank

__all__ = [
    "NO_GRADIENTS",
    "check_base",
    "check_differentiable",
    "check_hooks",
    "closure_error",
    "has_no_rate",
    "is_plain_adam",
    "is_step_on_zeros",
    "resting_groups",
]

# Optimizers that run inside backward or store gradients elsewhere: at step() no gradient is left to guide.
_UNSUPPORTED_BASES = {
    "OptimizerInBackwardWrapper": "runs inside backward",
    "LOMO": "runs inside backward",
    "AdaLomo": "runs inside backward",
    "CPUOffloadOptimizer": "moves gradients off the device during backward",
    "GaLoreLayerWise": "runs inside backward",
    "LayerWiseDummyOptimizer": "is a stand-in for optimizers that run inside backward",
    "DeepSpeedZeroOptimizer": "keeps gradients in partitions of its own",
    "DeepSpeedZeroOptimizer_Stage3": "keeps gradients in partitions of its own",
    "DeepSpeedOptimizerWrapper": "keeps gradients in partitions of its own",
}

# Wrappers that may decide whether a step is made, or unscale gradients within it.
_PREPARED = {
    "AcceleratedOptimizer": "guide it before prepare: accelerator.prepare(GradGuide(optimizer))",
    "LightningOptimizer": "guide it before Lightning wraps it: return GradGuide(optimizer) from configure_optimizers",
    "_FabricOptimizer": "guide it before setup: fabric.setup(model, GradGuide(optimizer))",
}

NO_GRADIENTS = (
    "no parameter has a gradient, so this step changes nothing: call loss.backward() before step(), and zero_grad() "
    "after it. If no batch reached these parameters, this is expected; further such steps give no warning"
)


def check_base(base: object) -> None:
    """Raise unless GradGuide can guide the gradients that ``base`` reads.

    Raises:
        TypeError: ``base`` is not an optimizer, or its steps cannot be guided.
        ValueError: no parameter requires a gradient, a group is differentiable, or FSDP1 shards the parameters.
        RuntimeError: DeepSpeed ZeRO shards the parameters.
    """
    kind = type(base).__name__
    if kind in _UNSUPPORTED_BASES:
        raise TypeError(
            f"{kind} {_UNSUPPORTED_BASES[kind]}, so at step() no gradient is left to guide; use a plain optimizer"
        )
    for prepared in {each.__name__ for each in type(base).__mro__} & _PREPARED.keys():
        raise TypeError(
            f"{kind} wraps an optimizer, and may skip steps while gradients accumulate, or unscale them in its step. "
            f"GradGuide would guide partial or scaled gradients; {_PREPARED[prepared]}"
        )
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"base must be a torch.optim.Optimizer, found {kind}; write GradGuide(AdamW(parameters, lr=...))"
        )
    if isinstance(base, LBFGS):
        raise TypeError(
            "LBFGS evaluates the closure several times within one step and searches along its own direction, which a "
            "guided gradient would contradict; use a first-order optimizer"
        )
    if _needs_closure(base):
        raise TypeError(closure_error(base))
    parameters = [p for group in base.param_groups for p in group["params"]]
    if not parameters:
        raise ValueError(
            "the base optimizer has no parameters; pass it those to train. PEFT loads an adapter frozen: use "
            "PeftModel.from_pretrained(model, path, is_trainable=True)"
        )
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"none of the {len(parameters)} parameters of the base optimizer requires a gradient; unfreeze the adapter "
            "first, or pass the optimizer the parameters that are trained"
        )
    check_differentiable(base.param_groups)
    check_divided(parameters)
    check_zero(base.param_groups)


def check_differentiable(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise if a param group has ``differentiable=True``.

    Raises:
        ValueError: GradGuide writes in place, which autograd cannot record.
    """
    if any(group.get("differentiable", False) for group in groups):
        raise ValueError(
            "differentiable=True records the step for autograd, and GradGuide writes gradients and parameters in "
            "place; use the base optimizer alone, or differentiable=False"
        )


def closure_error(base: Optimizer) -> str:
    """Return the error message for a base that evaluates the closure within its own step."""
    kind = type(base).__name__
    return (
        f"{kind} evaluates the closure within its own step, where GradGuide cannot guide the gradient. Guide the "
        f"optimizer that makes the final step instead: {kind}(parameters, gradguide.guided(AdamW), ...) where {kind} "
        "takes an optimizer class, or GradGuide(optimizer) as the optimizer that it wraps"
    )


def _needs_closure(base: Optimizer) -> bool:
    """Return whether ``base.step()`` needs a closure.

    Its signature may require one. Sharpness-aware optimizers call it between ``first_step`` and ``second_step``.
    """
    if hasattr(base, "first_step") and hasattr(base, "second_step"):
        return True
    closure = inspect.signature(type(base).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_hooks(base: Optimizer) -> None:
    """Raise if parameters have hooks that run during backward. Call it if no parameter has a gradient.

    Raises:
        RuntimeError: there are such hooks, which have probably consumed the gradients.
    """
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for group in base.param_groups for p in group["params"]):
        raise RuntimeError(
            "no parameter has a gradient: hooks on the parameters consume them during backward (layer-wise or "
            "offloading training), so at step() nothing is left to guide. Switch that mode off"
        )


def is_plain_adam(base: Optimizer) -> bool:
    """Return whether a step of ``base`` is exactly that of Adam or AdamW: no subclass, no hooks, no wrapped step."""
    if type(base) not in (Adam, AdamW) or "step" in vars(base):
        return False  # wrappers of optimizers may lack the hooks
    return not (
        base._optimizer_step_pre_hooks
        or base._optimizer_step_post_hooks
        or hooks._global_optimizer_pre_hooks
        or hooks._global_optimizer_post_hooks
    )


def has_no_rate(base: Optimizer) -> bool:
    """Return whether the rate of every group is 0. Rates on an accelerator are not read, which would synchronize."""
    return len(resting_groups(base)) == len(base.param_groups)


def resting_groups(base: Optimizer) -> set[int]:
    """Return indices of the groups whose rate is 0. Rates on an accelerator are not read, which would synchronize."""
    rates = enumerate(group.get("lr") for group in base.param_groups)
    return {index for index, lr in rates if not (isinstance(lr, Tensor) and lr.device.type != "cpu") and lr == 0}


def is_step_on_zeros(base: Optimizer) -> bool:
    """Return whether this step only allocates state: torch makes one for distributed checkpoints, if there is none.

    Its rates are 0, and all gradients are zero. The host reads gradients only if the base has no state and no rate. A
    sharded gradient may be zero on some ranks only, so ranks ask each other then.
    """
    if base.state or not has_no_rate(base):
        return False
    parameters = [p for group in base.param_groups for p in group["params"]]
    found = [local(p.grad) for p in parameters if p.grad is not None]
    moved = not found or any(bool(part.any()) for part in found)
    return not on_any_rank(moved, parameters)
