"""The evaluation suite: methods x scenarios x data sets x shots x learning rates x seeds, one row per run.

``python -m benchmarks.few_shot`` makes the runs and ``python -m benchmarks.few_shot.report`` the tables and figures,
from the rows alone. What it does, top down: ``grid`` lists runs, ``workers`` hands them out, ``scenarios`` turns a run
into problems, ``train`` trains one problem by one of ``methods`` and measures it, ``results`` keeps the row.
"""
