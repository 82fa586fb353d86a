"""GradGuide's metrics in Trainer's logs, and losses and text for :class:`gradguide.StructuredSource`."""

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
    """Adds the metrics of the optimizer's last step to Trainer's own training logs, at its logging steps only.

    ``Trainer(..., callbacks=[GradGuideCallback()])``. They appear as ``gradguide/coherence`` and so on in the state's
    ``log_history``, on the console, and in TensorBoard and whatever else Trainer reports to. What was not measured is
    left out. One transfer from the device per logging step, nothing at the others.

    Raises:
        ValueError: at the start of training, if Trainer's optimizer holds no GradGuide.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._guide(kwargs.get("optimizer"))
        _move_ahead(self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # of an evaluation, or the summary at the end
            return
        metrics = self._guide(kwargs.get("optimizer")).metrics()
        found = {f"gradguide/{key}": value for key, value in metrics.items() if math.isfinite(value)}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)  # Trainer has put a copy of the logs there already

    @staticmethod
    def _guide(optimizer: object) -> GradGuide:
        guide = unwrap(optimizer)
        if guide is None:
            raise ValueError(
                f"GradGuideCallback needs a GradGuide as the Trainer's optimizer, found {type(optimizer).__name__}; "
                "pass optimizers=(GradGuide(...), scheduler) or optimizer_cls_and_kwargs=(guided(AdamW), {...})"
            )
        return guide


def _move_ahead(callback: TrainerCallback) -> None:
    """Puts the callback before those that report, which would otherwise see the logs before the metrics are in them.

    Trainer puts its reporters first, and gives a callback no way to the handler that calls it but the call itself.
    """
    handler = sys._getframe(2).f_locals.get("self")
    if isinstance(handler, CallbackHandler):
        handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
