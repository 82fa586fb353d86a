"""GradGuide wraps an optimizer, so that few-shot fine-tuning keeps its direction, its size and what the model knew.

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
"""

import importlib.metadata as _metadata

from gradguide.factory import guided, unwrap
from gradguide.history import History
from gradguide.loss import guided_loss
from gradguide.optimizer import GradGuide
from gradguide.rules.alignment import Alignment
from gradguide.rules.direction import Direction
from gradguide.rules.magnitude import Magnitude
from gradguide.rules.objective import Regularizer
from gradguide.sources.replay import ReplaySource
from gradguide.sources.stored import SourceGradient

__all__ = [
    "Alignment",
    "Direction",
    "GradGuide",
    "History",
    "Magnitude",
    "Regularizer",
    "ReplaySource",
    "SourceGradient",
    "guided",
    "guided_loss",
    "unwrap",
]

try:
    __version__ = _metadata.version("gradguide")
except _metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
