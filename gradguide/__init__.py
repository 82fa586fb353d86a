"""Wrap a torch optimizer to guide few-shot fine-tuning in direction and magnitude, and to preserve source tasks.

    >>> import torch
    >>> from gradguide import GradGuide
    >>> model = torch.nn.Linear(8, 2)
    >>> optimizer = GradGuide(torch.optim.AdamW(model.parameters(), lr=1e-3))
    >>> for _ in range(3):
    ...     loss = model(torch.ones(4, 8)).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> optimizer.metrics()["steps"]
    3.0

The method is built from the abstract of arXiv 2506.00726.

Where to read on: ``optimizer.py``, whose ``step`` is about twenty lines, then ``step/engine.py``. From top to bottom,
each folder imports only from those below:

- ``cli``, ``demo``, ``integrations``: the command line, an example run, and other libraries.
- ``factory.py``, ``optim.py``: classes made from an optimizer class. ``wrapper.py``: what forwards to the base.
- ``checkpoint``: state dicts. ``regularizer``: terms on the gradient, added to the loss.
- ``step``: one guided step. ``rules``: its decisions, on Gram matrices only.
- ``sources``: gradients of source tasks. ``ops``: passes over the tensors, for each backend.
- ``base_checks.py``, ``distributed``, ``recording``, ``utils``: checks, ranks, metrics of a run, and helpers.
"""

import importlib as _importlib
import typing as _typing

from gradguide.utils.versions import installed_version as _installed_version

if _typing.TYPE_CHECKING:
    from gradguide.factory import guided, unwrap
    from gradguide.optimizer import GradGuide
    from gradguide.recording.history import History
    from gradguide.regularizer.loss import guided_loss
    from gradguide.regularizer.options import Regularizer
    from gradguide.rules.alignment import Alignment
    from gradguide.rules.direction import Direction
    from gradguide.rules.magnitude import Magnitude
    from gradguide.sources.replay import ReplaySource
    from gradguide.sources.stored import SourceGradient
    from gradguide.sources.structured import StructuredSource

__all__ = [
    "Alignment",
    "Direction",
    "GradGuide",
    "History",
    "Magnitude",
    "Regularizer",
    "ReplaySource",
    "SourceGradient",
    "StructuredSource",
    "guided",
    "guided_loss",
    "unwrap",
]

_MODULES = {
    "Alignment": "rules.alignment",
    "Direction": "rules.direction",
    "GradGuide": "optimizer",
    "History": "recording.history",
    "Magnitude": "rules.magnitude",
    "Regularizer": "regularizer.options",
    "ReplaySource": "sources.replay",
    "SourceGradient": "sources.stored",
    "StructuredSource": "sources.structured",
    "guided": "factory",
    "guided_loss": "regularizer.loss",
    "unwrap": "factory",
}


def __getattr__(name: str) -> _typing.Any:
    """Import a public name at first use: the command line starts, and can be interrupted, before torch loads."""
    if name == "__version__":
        value: _typing.Any = _installed_version("gradguide") or "0+unknown"
    elif name in _MODULES:
        value = getattr(_importlib.import_module(f"gradguide.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
