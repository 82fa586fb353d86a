"""Log GradGuide's metrics in Trainer; losses and text for :class:`gradguide.StructuredSource`."""

from __future__ import annotations

import math
import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from gradguide.factory import unwrap
from gradguide.integrations.sampling import own_text, sampled_loss
from gradguide.optimizer import GradGuide

__all__ = ["GradGuideCallback", "own_text", "sampled_loss"]


class GradGuideCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Add the metrics of the optimizer's last step to Trainer's training logs.

    Pass it as ``Trainer(..., callbacks=[GradGuideCallback()])``. Metrics appear as ``gradguide/coherence`` and so on in
    the state's ``log_history``, on the console, and in all reporters, such as TensorBoard. Metrics that are not finite
    are omitted. The cost is one transfer from the device per logging step.

    Raises:
        ValueError: at the start of training, if Trainer's optimizer does not contain a GradGuide.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._guide(kwargs.get("optimizer"))
        _move_to_front(self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # logs of an evaluation, or the final summary
            return
        metrics = self._guide(kwargs.get("optimizer")).metrics()
        found = {f"gradguide/{key}": value for key, value in metrics.items() if math.isfinite(value)}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)  # Trainer has appended a copy of the logs already

    @staticmethod
    def _guide(optimizer: object) -> GradGuide:
        guide = unwrap(optimizer)
        if guide is None:
            raise ValueError(
                f"GradGuideCallback needs a GradGuide as the Trainer's optimizer, found {type(optimizer).__name__}; "
                "pass optimizers=(GradGuide(...), scheduler) or optimizer_cls_and_kwargs=(guided(AdamW), {...})"
            )
        return guide


def _move_to_front(callback: TrainerCallback) -> None:
    """Move the callback before the reporters, which would otherwise receive the logs without the metrics.

    Trainer adds its reporters first. A callback has no reference to its handler, so it is read from the call stack.
    """
    handler = sys._getframe(2).f_locals.get("self")
    if isinstance(handler, CallbackHandler):
        handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
