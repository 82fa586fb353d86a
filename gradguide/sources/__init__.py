"""Sources: answers to "what is the source-task gradient at the present parameters?".

``protocol`` says what a source is. ``stored`` is :class:`gradguide.SourceGradient`, with ``capture``, ``files``,
``merge`` and ``anchor_weights``; ``replay`` is :class:`gradguide.ReplaySource`. ``validation`` matches sources with
parameters, ``base_model`` recognises the model that a source belongs to. Start at ``protocol``.
"""
