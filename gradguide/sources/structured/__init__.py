"""Sources in weight space: Kronecker-factored curvature of a base model, per linear layer.

Start at ``source.StructuredSource``. ``layers`` finds linear layers and adapters, ``capture`` observes them,
``factors`` holds S and G in low rank, ``pull`` is the gradient, ``storage`` the file.
"""

from gradguide.sources.structured.source import StructuredSource

__all__ = ["StructuredSource"]
