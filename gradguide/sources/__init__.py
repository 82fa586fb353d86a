"""Provide the source-task gradient at the current parameters.

- ``protocol``: the interface of a source. Start here.
- ``stored``: :class:`gradguide.SourceGradient`, with ``capture``, ``tables``, ``files``, ``merge``, ``anchor_weights``.
- ``replay``: :class:`gradguide.ReplaySource`.
- ``structured``: :class:`gradguide.StructuredSource`.
- ``validation``: matches sources with an optimizer's parameters; ``mismatch`` explains failures.
- ``base_model``: identifies the model that a source was captured from.
- ``side_effects``, ``undisturbed``: extra passes that leave a model unchanged.
"""
