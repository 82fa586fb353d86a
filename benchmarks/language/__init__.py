"""Evaluate methods that keep a language model's abilities while a fresh LoRA adapter learns a task from a few rows.

``python -m benchmarks.language.prepare`` makes a model folder from a GGUF file.
``python -m benchmarks.language`` makes the runs and writes one row per run.
``python -m benchmarks.language.report`` makes tables from the rows alone.

Where things are, in the order in which a run uses them:

- ``grid``: the runs, their order, and the file of their rows. ``pool``: worker processes.
- ``run``: one run, from its key to its row. ``scenarios``: what is learnt in which order, and what is measured.
- ``data``: tasks and source text as tokens. ``model``: the model, its adapter, and the gradient of a loss.
- ``sources``: files that runs share: structured sources, CorDA's directions, and text that the model writes itself.
- ``methods``: the methods compared. ``training``: what a method supplies. ``rivals``, ``starts``, ``fisher``,
  ``olora``: those of others. ``memories``: what is remembered of a finished task.
- ``measures``: target accuracy and drift. ``stability``: steadiness of gradients.
- ``report``: the report. ``results``, ``frontier``, ``tables``: its views.
"""
