"""An optimizer that wraps another one and shares its state and param groups."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from gradguide.checkpoint.entries import own_names

__all__ = ["Wrapper"]

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Wrapper(Optimizer):
    """Optimizer that forwards to ``base`` and has its own hooks.

    Warns:
        UserWarning: the base has loaded the state dict of a GradGuide.
    """

    def __init__(self, base: Optimizer) -> None:
        if any(map(own_names, base.state.values())):
            warnings.warn(
                "the base optimizer has loaded the state dict of a GradGuide, whose direction and counters it cannot "
                "use: they start from zero. To continue with them, call load_state_dict on the GradGuide instead",
                UserWarning,
                stacklevel=3,
            )
        # Optimizer.__init__ would create separate param groups. Besides those it only creates the hook dicts.
        self.make_hooks()
        self.base = base

    def make_hooks(self) -> None:
        """Create the hook dicts that ``Optimizer`` needs. Existing ones stay."""
        for name in _HOOKS:
            if name not in self.__dict__:
                setattr(self, name, OrderedDict())
        self._patch_step_function()

    # Forwarded rather than copied: schedulers and checkpoint loaders replace these attributes.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's param groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state. GradGuide's state is separate: optimizers treat an existing entry as initialised."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    # Properties, since Accelerate and Trainer use hasattr: it is False if the base lacks the method.

    @property
    def train(self) -> Callable[[], Any]:
        """The base's ``train``, which schedule-free optimizers have. AttributeError if the base has no such method."""
        return self.base.train  # type: ignore[attr-defined, no-any-return]

    @property
    def eval(self) -> Callable[[], Any]:
        """The base's ``eval``. AttributeError if the base has no such method."""
        return self.base.eval  # type: ignore[attr-defined, no-any-return]

    @_disable_dynamo  # like that of torch
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients by the base's ``zero_grad``, which may take no argument, as that of apex."""
        patched = vars(self.base).get("zero_grad")
        takes = inspect.signature(patched).parameters if patched else _takes_flag(type(self.base).zero_grad)
        if takes:
            self.base.zero_grad(set_to_none)
        else:
            self.base.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict, with GradGuide's tensors per parameter under keys ``gradguide.*``."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = self._own_state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of GradGuide or of the base alone. From the base alone, direction and counters are reset.

        Raises:
            ValueError: groups or shapes differ, an entry is damaged, or the format is newer. Nothing is changed.

        Warns:
            UserWarning: the state belongs to a plain base optimizer that has stepped.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._load_own_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _own_state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load_own_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


@lru_cache(maxsize=16)
def _takes_flag(zero_grad: Callable[..., None]) -> bool:
    """Return whether the ``zero_grad`` of a class takes ``set_to_none``. Cached: the signature of a function stays."""
    try:
        inspect.signature(zero_grad).bind(None, True)
    except TypeError:
        return False
    return True
