"""Metrics of a run per step: ``history`` stores and saves them, ``plotting`` draws them. Start at ``history``."""
