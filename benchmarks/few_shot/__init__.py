"""Evaluate methods on few-shot transfer: methods x scenarios x data sets x shots x learning rates x seeds.

``python -m benchmarks.few_shot`` makes the runs and writes one row per run.
``python -m benchmarks.few_shot.report`` makes tables and figures from the rows alone.

Where things are, in the order in which a run uses them:

- ``grid``: the runs and their order. ``results``: the file of rows, and the statistics of its rows.
- ``runs``: one run, from its key to its row. ``train``: one training, and what is measured of it.
- ``data``: what a method trains, and its rows. ``encoder`` and ``digits`` make problems.
- ``methods``: the methods compared. ``rivals``: what published methods change.
- ``report``, ``tables``: the report.
"""
