"""GradGuide: an optimizer that guides the gradient, then lets another one step."""

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
from gradguide.sources.protocol import Source
from gradguide.sources.validation import match_sources
from gradguide.step import nonfinite
from gradguide.step.buckets import Scope
from gradguide.step.engine import Engine
from gradguide.step.metrics import read
from gradguide.step.momentum import check_momentum
from gradguide.step.naming import extend_names, resolve_names
from gradguide.step.nonfinite import POLICIES
from gradguide.step.planner import StepPlanner
from gradguide.step.progress import Progress
from gradguide.utils.checks import check_choice, check_kind
from gradguide.utils.names import NamesLike, carried
from gradguide.wrapper import Wrapper

__all__ = ["GradGuide"]

_KINDS = {"direction": Direction, "alignment": Alignment, "magnitude": Magnitude, "regularizer": Regularizer}


class GradGuide(Wrapper):
    """Wrap ``base`` so that each step guides the gradient before the base's step, and the update after it.

    One step measures the Gram matrix of gradient, running direction and source gradients, decides on that small
    matrix, and combines: gradient and direction are written in place. Then the base steps, and rules on the update
    (alignment on "update", magnitude's bound) do the same on it.

    ``param_groups``, ``state`` and ``defaults`` *are* the base's. Schedulers, GradScaler, Accelerate and the state dict
    work as with the base alone. With every rule off each step is bitwise the base's. Hooks on the wrapper and on the
    base run once per step; torch's global optimizer hooks run for both. In groups with ``maximize=True`` the trajectory
    is that of the same problem stated as descent.

    With ``AdamW`` or ``Adam`` and ``fused=True`` on CUDA, the base's step is made in the combining pass, and ``p.grad``
    stays as received: see :mod:`gradguide.step.fused_adam`.

    Memory: one float32 row for the direction (none with ``share_momentum``), the sources' rows, and a copy of the
    parameters where a rule acts on the update and the base steps by itself.

    Source: built from the abstract of arXiv 2506.00726.

    Args:
        base: any first-order ``torch.optim.Optimizer``.
        direction, alignment, magnitude: options of each rule, or None for off.
        scope: the parameters of one Gram matrix: "global", "group" (param group), "module" (needs names; the parts of
            one layer's LoRA adapter together), "tensor", or a mapping from parameters to labels.
        regularizer: terms on the gradient, added to the loss exactly; needs ``step(closure)``. None for off.
        names: the parameters that sources are for; others are guided without them. A model, pairs such as
            ``model.named_parameters()`` or ``gradguide.integrations.peft.lora_parameters(model)``, or a mapping. A
            model is referenced weakly, and read again when parameters are unknown. Not needed if the base was given
            named parameters. Pairs and scopes may be taken before ``fully_shard`` or after it.
        nonfinite: what a NaN or Inf gradient does. "skip": no step, everything stays as it was; it is counted, and five
            in a row give a UserWarning. "raise": FloatingPointError, nothing changed. The host reads one flag per step,
            except with "skip" on CUDA where the base is fused; there it does not warn.
        backend: "auto" takes Triton kernels on CUDA where they can run, and the portable backend elsewhere; "foreach"
            is the portable one, "triton" the kernels or an error.

    Raises:
        TypeError, ValueError: the base cannot be guided, an option is out of range, or a source does not match the
            names. Nothing is changed.
        RuntimeError: ``backend="triton"`` is not available, or DeepSpeed ZeRO holds the parameters.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        direction: Direction | None = Direction(),  # noqa: B008 (frozen)
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
        options = {
            "direction": direction,
            "alignment": alignment,
            "magnitude": magnitude,
            "regularizer": regularizer,
            "nonfinite": nonfinite,
        }
        for name, kind in _KINDS.items():
            check_kind(name, options[name], kind)
        check_choice("nonfinite", nonfinite, POLICIES)
        check_backend(backend, {p.device for group in base.param_groups for p in group["params"]})
        if regularizer is not None and regularizer.direction > 0 and direction is None:
            raise ValueError(f"Regularizer(direction={regularizer.direction}) needs a direction, found direction=None")
        if direction is not None and direction.share_momentum:
            check_momentum(base, base.param_groups)
        known, scope = resolve_names(base.param_groups, names, scope)
        sources = match_sources(_sources(alignment, regularizer), base.param_groups, known)
        super().__init__(base)
        self._nonfinite = nonfinite
        self._regularizer = regularizer
        planner = StepPlanner(scope, known, sources, options, backend)
        planner.track_replaced(base)
        self._engine = Engine(direction, alignment, magnitude, planner)
        self._progress = Progress()

    # torch.compile leaves it out and calls it as it is, as it does with zero_grad: its passes are fused already, and a
    # graph would be made anew whenever a gradient is missing.
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Guide the gradients in place, then step the base.

        Args:
            closure: evaluated once, with gradients enabled, before anything else; with a regularizer perhaps twice: see
                :class:`gradguide.Regularizer`.

        Returns:
            What the closure returned, or None. ``p.grad`` is then the gradient that the base received, guided and
            clipped. It is as received from backward after a skipped step, with every rule off, and where the base's
            step is fused into the combining pass (see above), which never stores the guided gradient.

        Raises:
            RuntimeError: DeepSpeed ZeRO divides the parameters; hooks consume the gradients during backward; or, with
                a regularizer, there is no closure, or none that does what the regularizer asks.
            ValueError: a gradient is sparse or complex, or ranks that share the parameters differ in an option.
            FloatingPointError: a gradient is not finite and ``nonfinite="raise"``.

        Warns:
            UserWarning: no parameter has a gradient, the first time; the base then steps alone, and nothing changes.
                Or five steps in a row were skipped; once for each such run of steps.
        """
        engine = self._engine
        if not engine.active and self._regularizer is None:
            return self.base.step(closure) if closure is not None else self.base.step()
        loss, added = self._evaluate(closure)
        plan = engine.planner.plan(self.base)
        if plan is None:
            self._step_unguided()
            return loss
        state = engine.measure(plan, self.base, added)
        if not self._progress.should_skip(state, self.base, self._nonfinite, engine):
            engine.decide(state, self.base, self._progress.totals)
            if not engine.step_fused(state, self.base):
                engine.combine(state)
                measures = engine.rules.limit_update or self._progress.history is not None
                before = plan.snapshot() if measures else None
                nonfinite.step_base(state, self.base, self._nonfinite)
                if before is not None:
                    engine.correct(state, before)
        self._progress.finish(engine.record(state), self.metrics)
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> tuple[Any, dict[Tensor, Tensor] | None]:
        """Let sources refresh and the closure run. Return its loss, and what a regularizer adds to the gradient."""
        self._engine.planner.refresh(self.base)
        if self._regularizer is not None:
            return evaluate(closure, self.base, self._engine, self._regularizer, self._progress.totals[0])
        if closure is None:
            return None, None
        with torch.enable_grad():
            return closure(), None

    def _step_unguided(self) -> None:
        """Step the base alone, where no parameter has a gradient."""
        check_hooks(self.base)
        self._progress.warn_once(NO_GRADIENTS, stacklevel=7)
        self.base.step()
        self._progress.finish(None, self.metrics)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base. Parameters without a name are guided without sources.

        Names come from the group, or from ``names`` given before; :meth:`set_alignment` gives them later.

        Raises:
            TypeError: it is no dict, or its parameters are a set.
            ValueError: a source does not match a name, or ``share_momentum`` finds no momentum. Nothing is changed.
        """
        engine = self._engine
        added = param_group["params"] if isinstance(param_group, dict) else None
        if added is None or isinstance(added, set):
            self.base.add_param_group(param_group)  # which says what is wrong with it
            return
        check_differentiable([param_group])
        if engine.rules.direction is not None and engine.rules.direction.share_momentum:
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
        known = extend_names(planner.name_lookup, carried([param_group]), groups)
        sources = match_sources(_sources(engine.rules.alignment, self._regularizer), groups, known)
        self.base.add_param_group(param_group)
        planner.set_names(known, self.base)
        planner.set_sources(sources)

    def set_alignment(self, alignment: Alignment | None, names: NamesLike | None = None) -> None:
        """Use other sources, or none, from the next step on. Direction, statistics and the base stay as they are.

        A checkpoint holds no sources. Every rank must call it.

        Args:
            alignment: the options from now on, or None for off.
            names: added to the names so far, which they replace for the same parameter.

        Raises:
            TypeError, ValueError: as when a GradGuide is made. Nothing is changed.
        """
        check_kind("alignment", alignment, Alignment)
        engine = self._engine
        engine.planner.track_replaced(self.base)
        known = extend_names(engine.planner.name_lookup, names, self.param_groups)
        sources = match_sources(_sources(alignment, self._regularizer), self.param_groups, known)
        engine.planner.set_names(known, self.base)
        engine.set_alignment(alignment, sources)
        self._progress.last = None

    def metrics(self) -> dict[str, float]:
        """Return what the last step measured, read from the device at once.

        Values of several scopes are of all of them together: norms and cosines of all parameters, lengths after a bound
        over lengths before it, means of ``coherence`` and ``damping`` over the scopes that have a gradient.

        Returns:
            Floats by name. NaN where nothing was measured, where the rule is off, or where the step was skipped.

            - ``grad_norm``: length of the gradient as received.
            - ``guided_norm``: length of the guided gradient before clipping.
            - ``clip_factor``: what clipping multiplied it by, in [0, 1].
            - ``direction_cosine``: of the gradient as received with the running direction before it.
            - ``coherence``: how far the recent gradients agree, in [0, 1].
            - ``damping``: share of the part orthogonal to the direction that was removed, in [0, 1].
            - ``source_cosine``: of the gradient as received with the source gradient. In a group with
              ``maximize=True`` both count as the loss that the step makes smaller has them.
            - ``source_drift``: modelled KL in nats per token from where a structured source was captured, before the
              step.
            - ``conflict``: 1 if that cosine is negative beyond rounding in any scope, else 0.
            - ``update_norm``: length of the update, where a rule acts on it or a history is recorded.
            - ``update_factor``: what the bound multiplied the base's update by, in [0, 1]: 1 where it did not act, 0
              where an update that is not finite was undone.
            - ``skipped``, ``steps``: counts. A step whose gradients were all zero is none.

            With several sources also ``source_cosine/NAME`` and so on, by number where they have no names;
            the plain keys are the worst.
        """
        engine = self._engine
        sources = () if engine.rules.alignment is None else engine.rules.alignment.names
        totals = self._progress.totals
        return read(self._progress.last, engine.update_norm(totals.device), totals, sources)

    def record(self, history: History | None) -> None:
        """Append the metrics of each step from now on to ``history``; None ends it. It costs a host sync per step."""
        self._progress.history = history

    def _own_state_dict(self) -> dict[str, Any]:
        return checkpoint.merge(self.base.state_dict(), self.base, self._engine, self._progress.totals)

    def _load_own_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._progress.restart(checkpoint.load(state_dict, self.base, self._engine))

    def __getstate__(self) -> dict[str, Any]:
        # As torch does, without hooks, which may be anything, and without the method that a scheduler puts over step.
        kept = ("base", "_nonfinite", "_engine", "_regularizer", "_progress")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.make_hooks()

    def __repr__(self) -> str:
        engine = self._engine
        rules = (engine.rules.direction, engine.rules.alignment, engine.rules.magnitude, self._regularizer)
        return f"GradGuide({', '.join(str(rule) for rule in rules if rule is not None)})\n{self.base!r}"


def _sources(alignment: Alignment | None, regularizer: Regularizer | None) -> tuple[Source, ...]:
    return (*(alignment.sources if alignment else ()), *(regularizer.sources if regularizer else ()))
