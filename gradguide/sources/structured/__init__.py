"""Provide a source in weight space: Kronecker-factored curvature of a base model, per linear layer.

- ``source``: :class:`gradguide.StructuredSource`. Start here.
- ``layers``: finds linear layers and adapters.
- ``capture``, ``recorder``: accumulate statistics of the layers over source text.
- ``factors``: S and G in low rank.
- ``binding``, ``bound_layer``, ``pull``, ``rows``: the gradient with respect to a model's parameters.
- ``storage``: files.
"""

from gradguide.sources.structured.source import StructuredSource

__all__ = ["StructuredSource"]
