"""An optimizer that stands in the place of another: parameters, state and param groups are the base's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

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
    """Forwards to ``base``, and has hooks of its own."""

    def __init__(self, base: Optimizer) -> None:
        # Optimizer.__init__ would make param groups of its own; the dicts of hooks are all else that it sets up.
        self.make_hooks()
        self.base = base

    def make_hooks(self) -> None:
        """What ``Optimizer`` needs to have hooks; those that are there stay."""
        for name in _HOOKS:
            if name not in self.__dict__:
                setattr(self, name, OrderedDict())
        self._patch_step_function()

    # Forwarded, never copied: schedulers and checkpoint loaders replace them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's param groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state. GradGuide's own lives elsewhere, since bases take an entry here for a step already made."""
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

    # Truthful, by a property that raises AttributeError: hasattr is what Accelerate and Trainer ask.

    @property
    def train(self) -> Callable[[], Any]:
        """The base's own, to be called before training, where it has one, as schedule-free optimizers do."""
        return self.base.train  # type: ignore[attr-defined, no-any-return]

    @property
    def eval(self) -> Callable[[], Any]:
        """The base's own, to be called before evaluation or a checkpoint, where it has one."""
        return self.base.eval  # type: ignore[attr-defined, no-any-return]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base does."""
        self.base.zero_grad(set_to_none)
