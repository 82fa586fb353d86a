"""The demo on a causal language model: a fresh adapter learns a task from a few rows, and the model is to be kept.

Start at ``run.py``. ``model.py``: rows, loss and accuracy. ``report.py``: table, CSV file and figure.
"""
