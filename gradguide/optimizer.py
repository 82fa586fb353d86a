"""GradGuide: an optimizer that guides the gradient, then steps another optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the whole compiler at once
from torch.optim import Optimizer

from gradguide.base_checks import NO_GRADIENTS, check_base, check_differentiable, check_hooks
from gradguide.checkpoint import state_dict as checkpoint
from gradguide.ops import check_backend
from gradguide.recording.history import History
from gradguide.regularizer.evaluation import evaluate
from gradguide.regularizer.options import Regularizer
from gradguide.rules.alignment import Alignment
from gradguide.rules.direction import Direction
from gradguide.rules.magnitude import Magnitude
from gradguide.sources.matching import match_sources
from gradguide.sources.protocol import Source
from gradguide.step import nonfinite
from gradguide.step.buckets import Scope
from gradguide.step.engine import Engine
from gradguide.step.metrics import read
from gradguide.step.momentum import check_momentum
from gradguide.step.naming import extend_names, resolve_names, set_names
from gradguide.step.nonfinite import POLICIES
from gradguide.step.planner import StepPlanner
from gradguide.step.progress import NOTHING_RECORDED, Progress
from gradguide.utils.checks import check_choice, check_kind
from gradguide.utils.names import NamesLike, names_in_groups
from gradguide.wrapper import Wrapper

__all__ = ["GradGuide"]

_KINDS = {"direction": Direction, "alignment": Alignment, "magnitude": Magnitude, "regularizer": Regularizer}


class GradGuide(Wrapper):
    """Wrap ``base`` so that each step guides the gradient before the base's step, and the update after it.

    Each step measures the Gram matrix of gradient, running direction and source gradients, decides on that small
    matrix, and combines: gradient and direction are written in place. Then the base steps. Rules on the update
    (alignment on "update", magnitude's bound) repeat this on the update.

    ``param_groups``, ``state`` and ``defaults`` *are* the base's. Schedulers, GradScaler, Accelerate and the state dict
    work as with the base alone. With all rules off, each step is bitwise the base's. Hooks on the wrapper and on the
    base run once per step; torch's global optimizer hooks run for both. Groups with ``maximize=True`` follow the
    trajectory of the same problem written as descent.

    With ``AdamW`` or ``Adam`` and ``fused=True`` on CUDA, the combining pass also makes the base's step, and ``p.grad``
    stays as received: see :mod:`gradguide.step.fused_adam`.

    Memory: one float32 row for the direction (0 with ``share_momentum``) and the sources' rows. If a rule acts on the
    update and the base steps itself, also a copy of the parameters.

    Source: built from the abstract of arXiv 2506.00726.

    Args:
        base: any first-order ``torch.optim.Optimizer``.
        direction, alignment, magnitude: options of each rule. None turns the rule off.
        scope: the parameters of one Gram matrix: "global", "group" (param group), "module" (needs names; one scope per
            layer's LoRA adapter), "tensor", or a mapping from parameters to labels.
        regularizer: terms on the gradient, added to the loss exactly; needs ``step(closure)``. None turns it off.
        names: the parameters that sources act on; others are guided without sources. A model, pairs such as
            ``model.named_parameters()`` or ``gradguide.integrations.peft.lora_parameters(model)``, or a mapping. A
            model is referenced weakly, and read again for unknown parameters. Not needed if the base was given named
            parameters. Pairs and scopes may be taken before or after ``fully_shard``.
        nonfinite: handling of NaN or Inf gradients. "skip": the step changes nothing and is counted; five in a row give
            a UserWarning. "raise": FloatingPointError, nothing is changed. The host reads one flag per step, except
            with "skip" and a fused base on CUDA, which gives no warning.
        backend: "auto" uses Triton kernels on CUDA if they can run, else the portable backend. "foreach" is the
            portable backend. "triton" uses the kernels or raises.

    Raises:
        TypeError, ValueError: the base cannot be guided, an option is out of range, or a source does not match the
            names. Nothing is changed.
        RuntimeError: ``backend="triton"`` is not available, or DeepSpeed ZeRO shards the parameters.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        direction: Direction | None = None,
        alignment: Alignment | None = None,
        magnitude: Magnitude | None = Magnitude(),  # noqa: B008 (frozen)
        scope: Scope = "global",
        regularizer: Regularizer | None = None,
        names: NamesLike | None = None,
        nonfinite: str = "skip",
        backend: str = "auto",
    ) -> None:
        if isinstance(base, GradGuide):
            raise TypeError("base is a GradGuide already; give it all rules at once")
        check_base(base)
        options = {"direction": direction, "alignment": alignment, "magnitude": magnitude, "regularizer": regularizer}
        for name, kind in _KINDS.items():
            check_kind(name, options[name], kind)
        check_choice("nonfinite", nonfinite, POLICIES)
        check_backend(backend, {p.device for group in base.param_groups for p in group["params"]})
        if regularizer is not None and regularizer.direction > 0 and direction is None:
            needs = f"Regularizer(direction={regularizer.direction}) needs a direction"
            raise ValueError(f"{needs}, found direction=None: pass direction=Direction()")
        if direction is not None and direction.share_momentum:
            check_momentum(base, base.param_groups)
        known, scope = resolve_names(base.param_groups, names, scope)
        sources = match_sources(_sources(alignment, regularizer), base.param_groups, known)
        super().__init__(base)
        self._nonfinite = nonfinite
        self._regularizer = regularizer
        planner = StepPlanner(base, scope, known, sources, {**options, "nonfinite": nonfinite}, backend)
        self._engine = Engine(direction, alignment, magnitude, planner)
        self._progress = Progress()

    # Not traced by torch.compile, like zero_grad: the passes are fused already, and every missing gradient would cause
    # a recompilation.
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Guide the gradients in place, then step the base.

        If the base's step raises, compute the gradients again: another ``step()`` would guide the same ones twice.

        Args:
            closure: evaluated once, with gradients enabled, before the step. A regularizer may evaluate it twice: see
                :class:`gradguide.Regularizer`.

        Returns:
            The closure's result, or None. Then ``p.grad`` is the guided and clipped gradient.
            It stays as received from backward after a skipped step, with all rules off, and if the base's step is
            fused into the combining pass (see above).

        Raises:
            RuntimeError: DeepSpeed ZeRO shards the parameters, or hooks consume the gradients during backward. With a
                regularizer: the closure is missing, or does not do what the regularizer requires.
            ValueError: a gradient is sparse or complex, ranks differ in an option, or a source lacks a new parameter.
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.

        Warns:
            UserWarning: no parameter has a gradient (once): the base then steps alone, and nothing changes. Five steps
                in a row were skipped, or their updates undone. All rules are off, but a history is set (once).
        """
        engine = self._engine
        if not engine.rules.active and self._regularizer is None:
            if self._progress.history is not None:
                self._progress.warn_once(NOTHING_RECORDED, stacklevel=6)
            return self.base.step(closure) if closure is not None else self.base.step()
        loss, regularizer_gradient = self._evaluate(closure)
        plan = engine.planner.plan(self.base)
        if plan is None:
            self._step_unguided()
            return loss
        state = engine.measure(plan, self.base, regularizer_gradient)
        if not self._progress.skipped_on_host(state, self.base, self._nonfinite, engine.planner.names):
            engine.decide(state, self.base, self._progress.totals)
            if not engine.step_fused(state, self.base):
                engine.combine(state)
                before = engine.snapshot_if_needed(state, self.base, recorded=self._progress.history is not None)
                nonfinite.step_base(state, self.base, self._nonfinite)
                engine.correct_update(state, self.base, before)
        self._progress.finish(engine.record(state), self.metrics, self.base)
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> tuple[Any, dict[Tensor, Tensor] | None]:
        """Refresh the sources and run the closure. Return its loss, and the regularizer's gradient by parameter."""
        self._engine.planner.refresh(self.base)
        if self._regularizer is not None:
            return evaluate(closure, self.base, self._engine, self._regularizer, self._progress.totals[0])
        if closure is None:
            return None, None
        with torch.enable_grad():
            return closure(), None

    def _step_unguided(self) -> None:
        """Step the base alone, if no parameter has a gradient."""
        check_hooks(self.base)
        self._progress.warn_once(NO_GRADIENTS, stacklevel=7)
        self.base.step()
        self._progress.finish(None, self.metrics, self.base)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base. Parameters without a name are guided without sources.

        Names come from the group or from earlier ``names``. :meth:`set_alignment` can add them later.

        Raises:
            TypeError: the group is not a dict, or its parameters are a set.
            ValueError: a source does not match a name, or ``share_momentum`` finds no momentum. Nothing is changed.
        """
        engine = self._engine
        added = param_group["params"] if isinstance(param_group, dict) else None
        if added is None or isinstance(added, set):
            self.base.add_param_group(param_group)  # raises the base's own error
            return
        check_differentiable([param_group])
        if engine.rules.share_momentum:
            check_momentum(self.base, [param_group])
        # Read once: it may be a generator.
        param_group = {**param_group, "params": [added] if isinstance(added, Tensor) else list(added)}
        bare = [entry[-1] if isinstance(entry, tuple) and entry else entry for entry in param_group["params"]]
        if not all(isinstance(p, Tensor) for p in bare):
            self.base.add_param_group(param_group)
            return
        planner = engine.planner
        planner.track_replaced(self.base)
        groups = [*self.param_groups, {"params": bare}]
        known = extend_names(planner.name_lookup, names_in_groups([param_group]), groups)
        sources = match_sources(_sources(engine.rules.alignment, self._regularizer), groups, known, planner.sources)
        self.base.add_param_group(param_group)
        set_names(engine, known, sources, self.base)

    def set_alignment(self, alignment: Alignment | None, names: NamesLike | None = None) -> None:
        """Replace the sources from the next step on. Direction and base are unchanged, unless names change scopes.

        Checkpoints contain no sources. Call this on every rank.

        Args:
            alignment: the new options. None turns the rule off.
            names: added to the existing names. For the same parameter the new name replaces the old one.

        Raises:
            TypeError, ValueError: see :class:`GradGuide`. Nothing is changed.
        """
        check_kind("alignment", alignment, Alignment)
        engine, planner = self._engine, self._engine.planner
        planner.track_replaced(self.base)
        known = extend_names(planner.name_lookup, names, self.param_groups)
        sources = match_sources(_sources(alignment, self._regularizer), self.param_groups, known, planner.sources)
        engine.set_alignment(alignment, sources, self.base)
        self._progress.last = None
        set_names(engine, known, sources, self.base)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last step, with one transfer from the device.

        Values cover all scopes together: norms and cosines over all parameters, norms after a bound over norms before
        it, means of ``coherence`` and ``damping`` over the scopes that have a gradient.

        Returns:
            Floats by name. NaN if the value was not measured, the rule is off, or the step was skipped.

            - ``grad_norm``: norm of the gradient as received.
            - ``guided_norm``: norm of the guided gradient before clipping.
            - ``clip_factor``: factor of clipping, or of fitting the guided gradient into its dtype; in [0, 1].
            - ``direction_cosine``: cosine of the gradient as received with the running direction before the step.
            - ``coherence``: agreement of the recent gradients, in [0, 1].
            - ``damping``: removed share of the gradient part orthogonal to the direction, in [0, 1].
            - ``source_cosine``: cosine of the gradient as received with the source gradient. With ``maximize=True``
              both are those of the loss that the step decreases.
            - ``source_drift``: modelled KL in nats per token from the capture of a structured source, before the
              step.
            - ``conflict``: 1 if ``source_cosine`` is negative beyond rounding in any scope, else 0.
            - ``update_norm``: norm of the update, if a rule acts on it or a history is recorded. NaN on a CPU
              if the update was provably within its bound: see :mod:`gradguide.step.adam_bound`.
            - ``update_factor``: factor of the bound on the base's update, in [0, 1]: 1 if the bound was inactive, 0
              if an update that is not finite was undone.
            - ``skipped``, ``steps``: counts. Steps with only zero gradients are not counted.

            With several sources also ``source_cosine/NAME`` and so on (numbers if sources have no names). The plain
            keys then contain the worst value.
        """
        engine = self._engine
        sources = () if engine.rules.alignment is None else engine.rules.alignment.names
        totals = self._progress.totals
        return read(self._progress.last, engine.update_norm(totals.device), totals, sources)

    def record(self, history: History | None) -> None:
        """Append the metrics of each further step to ``history``; None stops it. It costs a host sync per step.

        With all rules off nothing is measured or appended: :meth:`step` gives a UserWarning.
        """
        self._progress.record(history)

    def _own_state_dict(self) -> dict[str, Any]:
        return checkpoint.merge(self.base.state_dict(), self.base, self._engine, self._progress.totals)

    def _load_own_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._progress.restart(checkpoint.load(state_dict, self.base, self._engine))

    def __getstate__(self) -> dict[str, Any]:
        # Like torch: without hooks, which may not be picklable, and without the step method that schedulers patch in.
        names = ("base", "_nonfinite", "_engine", "_regularizer", "_progress")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.make_hooks()

    def __repr__(self) -> str:
        engine = self._engine
        rules = (engine.rules.direction, engine.rules.alignment, engine.rules.magnitude, self._regularizer)
        return f"GradGuide({', '.join(str(rule) for rule in rules if rule is not None)})\n{self.base!r}"


def _sources(alignment: Alignment | None, regularizer: Regularizer | None) -> tuple[Source, ...]:
    return (*(alignment.sources if alignment else ()), *(regularizer.sources if regularizer else ()))
