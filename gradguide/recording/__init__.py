"""Metrics of a run, step by step: ``history`` keeps and saves them, ``plotting`` draws them. Start at ``history``."""
