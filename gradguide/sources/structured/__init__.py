"""Provide a source in weight space: Kronecker-factored curvature of a base model, per linear layer.

- ``source``: :class:`gradguide.StructuredSource`. Start here.
- ``layers``: finds linear layers and adapters.
- ``capture``, ``recorder``, ``statistics``: accumulate moments of the layers over source text.
- ``factors``: S and G in low rank.
- ``captured_weight``: recognises the weight that a layer had at capture.
- ``binding``, ``bound_layer``, ``pull``, ``pull_rows``: the gradient with respect to a model's parameters.
- ``packed``: names layers of other libraries, which are left out.
- ``storage``: files.
"""

from gradguide.sources.structured.source import StructuredSource

__all__ = ["StructuredSource"]
