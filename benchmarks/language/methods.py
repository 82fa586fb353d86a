"""The methods compared. A method is a string: a name, a strength for some, and options: ``structured rank=16``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from benchmarks.language import memories, rivals, starts, variants
from benchmarks.language.fisher import diagonal_fisher
from benchmarks.language.model import Language
from benchmarks.language.olora import freeze, olora
from benchmarks.language.osf import osf
from benchmarks.language.sources import TOKENS, Corda, File, OwnText, Unused
from benchmarks.language.training import Method, Setup, Training, clipped
from gradguide import Alignment, Direction, GradGuide, Magnitude, StructuredSource
from gradguide.integrations.peft import lora_parameters

__all__ = ["METHODS", "Entry", "Method", "family", "needs", "parse", "set_up"]

_COMMON = {"unit": "token", "base": "adamw", "schedule": "constant"}
_STRUCTURED = {
    "weight": "100", "rank": "64", "rest": "diag", "floor": "0.1", "text": "real", "tokens": str(TOKENS),
    "start": "random", "train": "both", "direction": "off", "bound": "0.05", "sources": "all", "merge": "off",
    "pull": "gradient", "least": "0", "rate": "1",
}  # fmt: skip
_DIRECTIONS = {"off": None, "on": Direction(), "shared": Direction(share_momentum=True)}

Remember: TypeAlias = Callable[[Language, memories.Batches, Method, Sequence[Any]], list[Any]]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method.

    Args:
        set_up: returns the training of one task.
        options: options beside the common ones, with their defaults.
        remember: returns what the method keeps of all finished tasks; called with the model, the batches of the task
            that is finished now, the method, and what it kept before. None for methods that keep nothing.
        of_text: whether a fresh run remembers the base model's source text too. A structured source of it is a file.
    """

    set_up: Callable[[Setup], Training]
    options: Mapping[str, str] = field(default_factory=dict)
    remember: Remember | None = None
    of_text: bool = False


def _clip(setup: Setup) -> Training:
    """Clip the gradient's norm at 1."""
    return setup.clipped()


def _quarter(setup: Setup) -> Training:
    """Clip, at a quarter of the learning rate."""
    return clipped(setup.base(rate=0.25))


def _defaults(setup: Setup) -> Training:
    """GradGuide without a source. Option: ``direction`` ("off", "on", or "shared": the base's momentum)."""
    return Training(optimizer=GradGuide(setup.base(), direction=_DIRECTIONS[setup.method.options["direction"]]))


def _structured(setup: Setup) -> Training:
    """GradGuide with a structured source.

    Options: ``weight`` and ``floor`` of the pull; ``rank`` (a number or "whole"), ``rest`` of the spectrum ("diag",
    "mean", "none"), ``text`` ("real", "own") and ``tokens`` of the source; ``start`` of A ("random", or "null": in the
    space that source inputs hardly use); ``train`` ("both", or "b": A is frozen); ``rate``, a factor of the learning
    rate; ``direction`` (see ``_defaults``);
    ``bound`` of the update (a number or "off"). After finished tasks: ``sources`` ("all": the base model's and those
    of the tasks, "tasks", "base"), and ``merge`` of those of the tasks into one ("on", "off"). ``pull``: where it acts
    ("gradient"; "update": also the hard part on the base's update; "after": only after the base's step, see
    ``variants``). ``least`` length of an update, relative to the parameters.
    """
    options = setup.method.options
    if options["start"] == "null":
        setup.model.start_in(setup.sources.unused())
    used: list[StructuredSource] = [] if options["sources"] == "base" else list(setup.kept)
    for source in used:
        source.floor = float(options["floor"])
    if options["merge"] == "on" and len(used) > 1:
        used = [StructuredSource.merge(used, [1.0] * len(used))]
        used[0].floor = float(options["floor"])
    if options["sources"] != "tasks":
        used.append(setup.sources.source(setup.method.spec, options["rest"], float(options["floor"])))
    rules: dict[str, Any] = {
        "direction": _DIRECTIONS[options["direction"]],
        "magnitude": Magnitude(max_update=None if options["bound"] == "off" else float(options["bound"])),
    }
    weight, hard = float(options["weight"]), True if options["pull"] == "update" else None
    alignment = Alignment(used, weight=weight, project=hard) if used and options["pull"] != "after" else None
    if options["train"] == "b":
        setup.model.freeze_a()
    base = setup.base(rate=float(options["rate"]))
    guide = GradGuide(base, alignment=alignment, names=setup.model.model, **rules)
    hooks: dict[str, Any] = {}
    if options["pull"] == "after":
        hooks["before"], hooks["after"] = variants.after_step(setup.model, used[-1], guide, weight)
    elif float(options["least"]) > 0:
        hooks["before"], hooks["after"] = variants.at_least(setup.model.parameters, float(options["least"]))
    return Training(optimizer=guide, held=used, **hooks)


def _anchored(setup: Setup) -> Training:
    """GradGuide with one anchored source of each finished task, or of source text; the strength is their weight."""
    if not setup.kept:
        return Training(optimizer=GradGuide(setup.base()))
    alignment = Alignment(list(setup.kept), weight=setup.method.strength)
    guide = GradGuide(setup.base(), alignment=alignment, names=lora_parameters(setup.model.model))
    return Training(optimizer=guide, held=setup.kept)


def _structured_kept(model: Language, batches: memories.Batches, method: Method, kept: Sequence[Any]) -> list[Any]:
    return [*kept, memories.structured(model, batches, method.spec.rank)]


def _diagonal_kept(model: Language, batches: memories.Batches, method: Method, kept: Sequence[Any]) -> list[Any]:
    return [*kept, memories.diagonal(model, batches)]


def _anchored_kept(model: Language, batches: memories.Batches, method: Method, kept: Sequence[Any]) -> list[Any]:
    return [*kept, memories.anchored(model, batches)]


def _fisher_kept(model: Language, batches: memories.Batches, method: Method, kept: Sequence[Any]) -> list[Any]:
    """Keep one sum over all tasks."""
    found = diagonal_fisher(model, batches)
    for earlier in kept:
        found.add(earlier)
    return [found]


METHODS: dict[str, Entry] = {
    "none": Entry(set_up=_clip),
    "clip": Entry(set_up=_clip),
    "quarter": Entry(set_up=_quarter),
    "joint": Entry(set_up=_clip),
    "l2sp": Entry(set_up=rivals.l2sp),
    "l2sp-ba": Entry(set_up=rivals.l2sp_product),
    "ewc": Entry(set_up=rivals.ewc, remember=_diagonal_kept, of_text=True),
    "ewc-lora": Entry(set_up=rivals.ewc_lora, remember=_fisher_kept, of_text=True),
    "early": Entry(set_up=rivals.early),
    "kl": Entry(set_up=rivals.kl_term, options={"text": "own", "every": "1"}),
    "replay": Entry(set_up=rivals.replay, options={"text": "real", "every": "1"}),
    "null": Entry(set_up=starts.null),
    "lora-null": Entry(set_up=starts.lora_null, options={"train": "both"}),
    "corda": Entry(set_up=starts.corda),
    "osf": Entry(set_up=osf),
    "olora": Entry(set_up=olora, remember=freeze),
    "defaults": Entry(set_up=_defaults, options={"direction": "off"}),
    "anchored": Entry(set_up=_anchored, remember=_anchored_kept, of_text=True),
    "structured": Entry(set_up=_structured, options=_STRUCTURED, remember=_structured_kept),
}
"""``none`` trains nothing. ``joint`` is for sequences: all tasks at once, the upper bound."""


def parse(text: str) -> Method:
    """Return the method that ``text`` describes.

    Raises:
        ValueError: there is no such method or option.
    """
    first, *rest = text.split()
    name, _, strength = first.partition(":")
    if name not in METHODS:
        raise ValueError(f"a method must be one of {', '.join(METHODS)}, found {name!r} in {text!r}")
    options = {**_COMMON, **METHODS[name].options}
    for part in rest:
        key, _, value = part.partition("=")
        if key not in options or not value:
            raise ValueError(f"options of {name} are KEY=VALUE with {', '.join(options)}, found {part!r} in {text!r}")
        options[key] = value
    return Method(name=name, strength=float(strength or 1.0), options=options)


def family(text: str) -> str:
    """Return the method without its strength or weight, which are tuned: ``kl every=4`` for ``kl:3 every=4``."""
    first, *rest = text.split()
    return " ".join([first.partition(":")[0], *(part for part in rest if not part.startswith("weight="))])


def needs(method: Method) -> frozenset[File]:
    """Return the shared files that a method reads."""
    if method.name == "structured":
        own = frozenset[File]() if method.options["sources"] == "tasks" else frozenset[File]({method.spec})
        return own | {Unused()} if method.options["start"] == "null" else own
    if method.options.get("text") == "own":
        return frozenset({OwnText(TOKENS)})
    files: dict[str, File] = {"null": Unused(), "lora-null": Unused(), "corda": Corda()}
    return frozenset({files[method.name]} if method.name in files else ())


def set_up(method: Method, setup: Setup) -> Training:
    """Return the training of ``method``; it may move the adapter's start."""
    return METHODS[method.name].set_up(setup)
