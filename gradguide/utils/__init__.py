"""Shared helpers: ``checks`` of option values, ``names`` of parameters, ``atomic`` file writes, ``constants``."""
