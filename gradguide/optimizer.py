"""GradGuide: an optimizer that guides the gradient, then lets another one step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the whole compiler at once
from torch.optim import Optimizer

from gradguide import checkpoint, finite
from gradguide.bases import NO_GRADIENTS, check_base, check_differentiable, check_hooks
from gradguide.buckets import Scope, labeller
from gradguide.checks import check_choice, check_kind
from gradguide.finite import POLICIES
from gradguide.guidance import Guidance
from gradguide.history import History
from gradguide.metrics import Record, read
from gradguide.momentum import check_momentum
from gradguide.naming import Names, NamesLike, carried
from gradguide.objective import evaluate
from gradguide.ops import check_backend
from gradguide.resharded import find_sharded
from gradguide.rules.alignment import Alignment
from gradguide.rules.direction import Direction
from gradguide.rules.magnitude import Magnitude
from gradguide.rules.objective import Regularizer
from gradguide.sources.match import match_sources
from gradguide.sources.source import Source
from gradguide.survey import Surveyor
from gradguide.wrapper import Wrapper

__all__ = ["GradGuide"]


class GradGuide(Wrapper):
    """Wrap ``base`` so that each step guides the gradient before, and if asked the update after, the base's step.

    One step is three moves. *Measure*: one read of the gradient g, the running direction d and the source gradients s_k
    gives their Gram matrix. *Decide*: the rules work on that small matrix (direction, alignment on the gradient,
    magnitude). *Combine*: g and d are written, in place. Then the base steps, and what acts on the update (alignment on
    "update", magnitude's bound) does the same three moves on it.

    It is an optimizer like any other: ``param_groups``, ``state`` and ``defaults`` *are* the base's; schedulers,
    GradScaler, Accelerate and the state dict work as with the base alone. With every rule off each step is the base's,
    bitwise. Hooks registered on it run once per step, and those on the base once; torch's global optimizer hooks run
    for both.

    Where the base is ``AdamW`` or ``Adam`` with ``fused=True`` on CUDA and at most four sources project the update, the
    base's step is made in the same pass, in the base's own state; ``p.grad`` then stays as received (see
    :mod:`gradguide.fused`).

    Memory: one float32 row for the direction (none with ``share_momentum``), the sources' rows, and one copy of the
    parameters where a rule acts on the update and the base steps by itself.

    Source: built from the abstract of arXiv 2506.00726.

    Args:
        base: any first-order ``torch.optim.Optimizer``.
        direction: options of direction consistency, or None for off.
        alignment: options of source-target alignment, or None for off.
        magnitude: options of magnitude control, or None for off.
        scope: over which parameters one Gram matrix runs: "global", "group" (param group), "module" (needs names; the
            parts of one layer's LoRA adapter together), "tensor", or a mapping from parameters to labels, as
            ``gradguide.integrations.peft.lora_scopes`` gives; it is read once.
        regularizer: terms on the gradient, added to the loss exactly and not to first order, or None; needs
            ``step(closure)``.
        names: the parameters that the source is for; others are guided without it. A model, pairs such as
            ``model.named_parameters()`` or ``gradguide.integrations.peft.lora_parameters(model)``, or a mapping between
            parameters and names. A model is referenced weakly, and read again when parameters are unknown (after
            ``fully_shard``, or when a group is added). Not needed if the base was given named parameters.
            Pairs and scopes may be taken before ``fully_shard`` or after it.
        nonfinite: what a NaN or Inf gradient does. "skip": no step, everything stays as it was, and
            ``metrics()["skipped"]`` counts it; a UserWarning follows five skipped steps in a row. "raise":
            FloatingPointError, nothing changed. The host reads one flag per step, except with "skip" on CUDA where the
            base is fused; there it does not warn.
        backend: "auto" takes the fused kernels (Triton) on CUDA where they can run, and the portable backend elsewhere;
            "foreach" is the portable one, "triton" the fused kernels or an error.

    Raises:
        TypeError, ValueError: the base cannot be guided, an option is out of range, a source comes without names or
            does not match them. Nothing is changed.
        RuntimeError: ``backend="triton"`` cannot be had; the message says why.
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
        for option, value, kind in (
            ("direction", direction, Direction),
            ("alignment", alignment, Alignment),
            ("magnitude", magnitude, Magnitude),
            ("regularizer", regularizer, Regularizer),
        ):
            check_kind(option, value, kind)
        check_choice("nonfinite", nonfinite, POLICIES)
        check_backend(backend, {p.device for group in base.param_groups for p in group["params"]})
        if regularizer is not None and regularizer.direction > 0 and direction is None:
            raise ValueError(f"Regularizer(direction={regularizer.direction}) needs a direction, found direction=None")
        if direction is not None and direction.share_momentum:
            check_momentum(base, base.param_groups)
        known = Names(names if names is not None else carried(base.param_groups))
        known.of(p for group in base.param_groups for p in group["params"])
        replaced = find_sharded([*known.found, *(scope if isinstance(scope, Mapping) else ())], base.param_groups)
        known.found = {replaced.get(p, p): name for p, name in known.found.items()}
        if isinstance(scope, Mapping):
            scope = {replaced.get(p, p): label for p, label in scope.items()}
        labeller(scope, known.found)
        sources = match_sources(_sources(alignment, regularizer), base.param_groups, known)
        super().__init__(base)
        self._nonfinite = nonfinite
        self._regularizer = regularizer
        options = {
            "direction": direction,
            "alignment": alignment,
            "magnitude": magnitude,
            "regularizer": regularizer,
            "nonfinite": nonfinite,
        }
        surveyor = Surveyor(scope, known, sources, options, backend)
        surveyor.follow(base)
        self._guidance = Guidance(direction, alignment, magnitude, surveyor)
        self._totals = torch.zeros(2, dtype=torch.float64)
        self._skipped_in_row = 0
        self._last: Record | None = None
        self._history: History | None = None
        self._warned: set[str] = set()

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
            UserWarning: no parameter has a gradient, the first time; the base then steps alone, and nothing changes. Or
                five steps in a row were skipped; once for each such run of steps.
        """
        guidance = self._guidance
        if not guidance.active and self._regularizer is None:
            return self.base.step(closure) if closure is not None else self.base.step()
        check_differentiable(self.base.param_groups)
        guidance.surveyor.refresh(self.base)
        loss, added = None, None
        if self._regularizer is not None:
            loss, added = evaluate(closure, self.base, guidance, self._regularizer, self._totals[0])
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()

        measured = guidance.measure(self.base, added)
        if measured is None:
            self._step_unguided()
            return loss
        if not measured.survey.buckets:
            self._warn_once(NO_GRADIENTS, stacklevel=6)  # other ranks may have gradients, and wait for this one
        # Changed in place from here on, so that a CUDA graph that replays the step counts on.
        self._totals = self._totals.to(measured.span.gram.device)
        if finite.stops(measured, self.base, self._nonfinite, guidance.surveyor.names):
            self._totals[1] += 1
            self._skipped_in_row += 1
            if self._skipped_in_row == finite.TROUBLE:
                finite.warn(measured, finite.TROUBLE, guidance.surveyor.names)
        else:
            self._skipped_in_row = 0
            guidance.guide(measured, self.base, self._totals)
            if not guidance.step_fused(measured, self.base):
                guidance.combine(measured)
                if guidance.acts_on_update or self._history is not None:
                    guidance.before.keep(measured.survey.buckets)
                    finite.step(measured, self.base, self._nonfinite)
                    guidance.correct(measured)
                else:
                    finite.step(measured, self.base, self._nonfinite)
        self._last = guidance.record(measured)
        if self._history is not None:
            self._history.append(self.metrics())
        return loss

    def _step_unguided(self) -> None:
        """Step the base alone, where no parameter has a gradient."""
        check_hooks(self.base)
        self._warn_once(NO_GRADIENTS, stacklevel=7)
        self.base.step()
        self._last = None
        if self._history is not None:
            self._history.append(self.metrics())

    def _warn_once(self, message: str, stacklevel: int) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=stacklevel)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base. Parameters without a name are guided without the source.

        A parameter has a name if the group pairs it with one, or if it is among the ``names`` given before (of a model:
        among its parameters by now). :meth:`set_alignment` gives names later.

        Raises:
            TypeError: it is no dict, or its parameters are a set.
            ValueError: the source does not match a name that is known, or ``share_momentum`` finds no momentum in the
                group. Nothing is changed.
        """
        guidance = self._guidance
        added = param_group["params"] if isinstance(param_group, dict) else None
        if added is None or isinstance(added, set):
            self.base.add_param_group(param_group)  # which says what is wrong with it
            return
        if guidance.rules.direction is not None and guidance.rules.direction.share_momentum:
            check_momentum(self.base, [param_group])
        check_differentiable([param_group])
        # Read once: it may be a generator.
        param_group = {**param_group, "params": [added] if isinstance(added, Tensor) else list(added)}
        surveyor = guidance.surveyor
        surveyor.follow(self.base)
        known = surveyor.known.merged(carried([param_group]))
        bare = [entry[1] if isinstance(entry, tuple) else entry for entry in param_group["params"]]
        asked = _sources(guidance.rules.alignment, self._regularizer)
        sources = match_sources(asked, [*self.param_groups, {"params": bare}], known)
        self.base.add_param_group(param_group)
        surveyor.rename(known, self.base)
        surveyor.ask(sources)

    def set_alignment(self, alignment: Alignment | None, names: NamesLike | None = None) -> None:
        """From the next step on align with other sources, or none. Direction, statistics and the base stay as they are.

        A checkpoint holds no sources: after loading one, the sources are those of this optimizer. Where parameters lie
        over ranks, every rank must call it.

        Args:
            alignment: the options from now on, or None for off.
            names: as when a GradGuide is made, added to the names that it has. A parameter that has a name already
                takes the new one.

        Raises:
            TypeError, ValueError: as when a GradGuide is made. Nothing is changed.
        """
        check_kind("alignment", alignment, Alignment)
        guidance = self._guidance
        guidance.surveyor.follow(self.base)
        known = guidance.surveyor.known.merged(names)
        sources = match_sources(_sources(alignment, self._regularizer), self.param_groups, known)
        guidance.surveyor.rename(known, self.base)
        guidance.align(alignment, sources)
        self._last = None

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
            - ``conflict``: 1 if that cosine is negative beyond rounding in any scope, else 0.
            - ``update_norm``: length of the update, where a rule acts on it or a history is recorded. It is taken from
              the parameters as they are now, so read it before anything else changes them.
            - ``update_factor``: what the bound multiplied the base's update by, in [0, 1]: 1 where it did not act, 0
              where an update that is not finite was undone.
            - ``skipped``, ``steps``: counts. A step whose gradients were all zero is none.

            With several sources also ``source_cosine/NAME`` and ``conflict/NAME``, by number where they have no names;
            the plain keys are the worst.
        """
        guidance = self._guidance
        sources = () if guidance.rules.alignment is None else guidance.rules.alignment.names
        norm = guidance.before.update_norm(self._totals.device)
        return read(self._last, norm, self._totals, sources)

    def record(self, history: History | None) -> None:
        """Append the metrics of each step from now on to ``history``; None ends it. It costs a host sync per step."""
        self._history = history

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, and GradGuide's own tensors per parameter under keys ``gradguide.*``."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state = checkpoint.merge(self.base.state_dict(), self.base, self._guidance, self._totals)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of GradGuide, or of the base alone; then direction and counters start anew.

        Raises:
            ValueError: groups or shapes differ, an entry is damaged, or the format is newer. Nothing is changed.

        Warns:
            UserWarning: the state is that of a plain base optimizer that has stepped.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._totals = checkpoint.load(state_dict, self.base, self._guidance)
        self._last = None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # As torch does, without hooks, which may be anything, and without the method that a scheduler puts over step.
        kept = (
            "base", "_nonfinite", "_guidance", "_regularizer", "_totals", "_skipped_in_row", "_last", "_history",
            "_warned",
        )  # fmt: skip
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.make_hooks()

    def __repr__(self) -> str:
        guidance = self._guidance
        rules = (guidance.rules.direction, guidance.rules.alignment, guidance.rules.magnitude, self._regularizer)
        return f"GradGuide({', '.join(str(rule) for rule in rules if rule is not None)})\n{self.base!r}"


def _sources(alignment: Alignment | None, regularizer: Regularizer | None) -> tuple[Source, ...]:
    """Those of the alignment first."""
    return (*(alignment.sources if alignment else ()), *(regularizer.sources if regularizer else ()))
