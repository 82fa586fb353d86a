"""Guide the optimizer of Trainer and TRL's trainers, log metrics; losses for :class:`gradguide.StructuredSource`.

TRL's DPOTrainer with ``peft_config``, guided by one added line::

    # recipe: dpo.py
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from gradguide.integrations.transformers import guide

    words = {word: index for index, word in enumerate("<pad> </s> <unk> what is a good bad answer".split())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    pairs = [{"prompt": "what is a good answer", "chosen": "a good answer", "rejected": "a bad answer"}] * 8

    trainer = DPOTrainer(
        LlamaForCausalLM(config),
        args=DPOConfig("output", max_steps=4, logging_steps=2, report_to=[], bf16=False),
        train_dataset=Dataset.from_list(pairs),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    guide(trainer)
    trainer.train()
    print(trainer.state.log_history[0]["gradguide/grad_norm"])
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from gradguide.factory import recipe_of, unwrap
from gradguide.integrations.drift import drift
from gradguide.integrations.sampling import own_text, sampled_loss
from gradguide.optimizer import GradGuide
from gradguide.rules.alignment import Alignment
from gradguide.rules.magnitude import Magnitude
from gradguide.sources.structured import StructuredSource
from gradguide.utils.names import NamesLike

__all__ = ["GradGuideCallback", "drift", "guide", "own_text", "sampled_loss"]

_logger = logging.getLogger(__name__)


def guide(
    trainer: Trainer,
    alignment: Alignment | None = None,
    *,
    names: NamesLike | Callable[[nn.Module], NamesLike] | None = None,
    **options: Any,
) -> None:
    """Guide the optimizer that the trainer will create. Call it between creating the trainer and ``train()``.

    The base is what the trainer's own ``create_optimizer`` returns, with its learning rate, betas, weight decay, groups
    and ``optim=``. It works with Trainer, Seq2SeqTrainer and TRL's trainers, also with ``peft_config``. Metrics are
    added to the trainer's logs, see :class:`GradGuideCallback`.

    Clipping is left to GradGuide. Without ``magnitude``, the bound is the trainer's ``max_grad_norm`` (0: no bound on
    the gradient). The trainer's own clipping is switched off in a copy of its arguments, and one log line says so.

    A structured source is bound to the model in this call: a trainer that resumes loads trained weights before it
    creates the optimizer. So its pull is relative to the captured weights, also where whole weights are trained.

    Args:
        trainer: a trainer that has no optimizer yet.
        alignment: see :class:`gradguide.Alignment`.
        names: see :class:`gradguide.GradGuide`; or a function of the model, such as
            ``gradguide.integrations.peft.lora_parameters``, for a source of some of the trained parameters. The default
            is the trainer's model. Functions and models are read when the optimizer is created.
        options: further arguments of :class:`gradguide.GradGuide`. If the trainer has
            ``optimizer_cls_and_kwargs=(guided(AdamW, ...), {...})``, the options of that class are added to these, and
            a missing ``lr`` is the trainer's ``learning_rate``.

    Raises:
        TypeError: ``trainer`` is not a Trainer, or an option is unknown.
        ValueError: the trainer has an optimizer, uses DeepSpeed, or was passed to this function before; a regularizer
            is given, which needs a closure. Nothing is changed. ``train()`` raises before the first step if GradGuide
            refuses the optimizer, an option or a source.
    """
    inspect.signature(GradGuide).bind(None, names=names, alignment=alignment, **options)
    _check_trainer(trainer, options)
    base_class, recipe = _class_of(trainer)
    own = {} if recipe is None else dict(recipe)
    if twice := sorted(own.keys() & {*options, *(("alignment",) if alignment else ()), *(("names",) if names else ())}):
        raise ValueError(f"{', '.join(twice)}: given to guided(...) and to guide(...); give each option once")
    alignment, names = own.pop("alignment", alignment), own.pop("names", names)
    options = {"magnitude": Magnitude(max_norm=trainer.args.max_grad_norm or math.inf), **own, **options}
    alignment = _bound(alignment, trainer.model)
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        before = trainer.optimizer
        if recipe is not None:  # the rate is read now: each trial of a hyperparameter search has its own
            kind, arguments = base_class
            trainer.optimizer_cls_and_kwargs = kind, {"lr": trainer.args.learning_rate, **arguments}
        create(*args, **kwargs)
        if trainer.optimizer is not before:  # it stays in a second train()
            model = next((arg for arg in (*args, *kwargs.values()) if arg is not None), trainer.model)
            given = names(model) if callable(names) and not isinstance(names, nn.Module) else names
            trainer.optimizer = GradGuide(
                trainer.optimizer, names=model if given is None else given, alignment=alignment, **options
            )
        return trainer.optimizer

    trainer.create_optimizer = create_optimizer
    trainer.optimizer_cls_and_kwargs = base_class
    _stop_clipping(trainer, options["magnitude"])
    if not any(isinstance(callback, GradGuideCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(GradGuideCallback())


def _check_trainer(trainer: Trainer, options: Mapping[str, Any]) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(f"guide() takes a transformers.Trainer, found {type(trainer).__name__}")
    if trainer.create_optimizer.__module__ == __name__:  # it was replaced by guide()
        raise ValueError("the trainer is guided already: call guide() once, with all options")
    if trainer.optimizer is not None:
        raise ValueError(
            f"the trainer has an optimizer already, found {type(trainer.optimizer).__name__}: call guide() before "
            "train(), and create the trainer without optimizers=; or pass it optimizers=(GradGuide(...), scheduler)"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "the trainer uses DeepSpeed, which computes and clips gradients in partitions: use DDP, or FSDP with "
            "fsdp_config={'version': 2}"
        )
    if options.get("regularizer") is not None:
        raise ValueError("a regularizer needs step(closure), and Trainer gives no closure: leave regularizer=None")


def _class_of(trainer: Trainer) -> tuple[Any, dict[str, Any] | None]:
    """Return the ``optimizer_cls_and_kwargs`` of the base, and the options of a guided class in it, if it is one."""
    if trainer.optimizer_cls_and_kwargs is None:
        return None, None
    kind, arguments = trainer.optimizer_cls_and_kwargs
    recipe = recipe_of(kind)
    if recipe is not None:
        return (recipe[0], arguments), recipe[1]
    if isinstance(kind, type) and issubclass(kind, GradGuide):
        raise ValueError(f"{kind.__name__} is a GradGuide already: give optimizer_cls_and_kwargs its base class")
    return (kind, arguments), None


def _bound(alignment: Alignment | None, model: nn.Module) -> Alignment | None:
    """Bind structured sources to the model as it is now."""

    def bind(source: Any) -> Any:
        try:
            return source.bound(model) if isinstance(source, StructuredSource) else source
        except ValueError:  # the model may get its adapter or weights later; if not, GradGuide raises this
            return source

    if not isinstance(alignment, Alignment):  # GradGuide raises for another type
        return alignment
    given = alignment.source
    if isinstance(given, Mapping):
        return replace(alignment, source={name: bind(source) for name, source in given.items()})
    return replace(alignment, source=[*map(bind, given)] if isinstance(given, Sequence) else bind(given))


def _stop_clipping(trainer: Trainer, magnitude: Magnitude | None) -> None:
    limit = trainer.args.max_grad_norm
    if not limit:
        return
    trainer.args = copy.copy(trainer.args)  # the caller may use its arguments for other trainers
    trainer.args.max_grad_norm = 0.0
    if trainer.is_world_process_zero():
        _logger.warning("Trainer's clipping at max_grad_norm=%s is off, GradGuide has magnitude=%s", limit, magnitude)


class GradGuideCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Add the metrics of the optimizer's last step to Trainer's training logs.

    :func:`guide` adds it. Alone, pass it as ``Trainer(..., callbacks=[GradGuideCallback()])``. Metrics appear as
    ``gradguide/grad_norm`` and so on in the state's ``log_history``, on the console, and in all reporters, such as
    TensorBoard. Metrics that are not finite are omitted. The cost is one transfer from the device per logging step.

    Raises:
        ValueError: at the start of training, if Trainer's optimizer does not contain a GradGuide.

    Warns:
        UserWarning: at the start of training, if Trainer clips gradients too.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._guide(kwargs.get("optimizer"))
        if 0 < (args.max_grad_norm or 0) < math.inf:
            warnings.warn(
                f"Trainer clips gradients at max_grad_norm={args.max_grad_norm} before GradGuide receives them, which "
                "weakens them beside a source's pull: set max_grad_norm=0 and leave clipping to GradGuide's Magnitude, "
                "as guide(trainer) does",
                UserWarning,
                stacklevel=2,
            )
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
                "call gradguide.integrations.transformers.guide(trainer) before training, or pass "
                "optimizers=(GradGuide(...), scheduler)"
            )
        return guide


def _move_to_front(callback: TrainerCallback) -> None:
    """Move the callback before the reporters, which would otherwise receive the logs without the metrics.

    Trainer adds its reporters first. A callback has no reference to its handler, so it is read from the call stack.
    """
    handler = sys._getframe(2).f_locals.get("self")
    if isinstance(handler, CallbackHandler):
        handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
