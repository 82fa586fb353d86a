"""Shared helpers: option ``checks``, parameter ``names``, ``atomic`` file writes, ``versions`` and ``constants``."""
