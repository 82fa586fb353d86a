"""The demo on a causal language model: a new adapter learns a task from a few rows, without drifting from the model.

Start at ``run.py``. ``model.py``: rows, loss and accuracy. ``report.py``: table, CSV file and figure.
"""
