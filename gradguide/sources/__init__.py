"""Provide the source-task gradient at the current parameters.

- ``protocol``: the interface of a source. Start here.
- ``structured``: :class:`gradguide.StructuredSource`.
- ``stored``: :class:`gradguide.SourceGradient`. ``capture`` computes its tables, ``stored_tables`` checks and hashes
  them, ``merge`` and ``anchor_weights`` derive others from them.
- ``replay``: :class:`gradguide.ReplaySource`.
- ``files``, ``metadata``: source files, and the facts about a capture in them.
- ``matching``: matches sources with an optimizer's parameters; ``mismatch`` explains failures.
- ``base_model``: identifies the model that a source was captured from.
- ``batch_gradient``: the gradient of one batch. ``loss_value`` checks its loss, ``examples`` counts its examples.
- ``undisturbed``, ``side_effects``: extra passes that leave a model, or parameters alone, unchanged. ``checkpointing``
  keeps gradient checkpointing on in them.
"""
