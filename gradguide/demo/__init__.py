"""The demo of ``gradguide demo``: few-shot adaptation of a LoRA adapter, with and without GradGuide.

Start at ``run.py``. ``prepare`` trains a source adapter and captures its source gradient. ``compare`` adapts it to the
target task with any set of methods. ``run`` does both and writes the report. The library itself imports nothing from
here.

- ``config.py``: options and errors. ``data.py``: texts, tasks and sampling.
- ``model.py``: encoder, adapter and heads. ``source.py``: source training and capture.
- ``compare.py``: methods and their runs. ``report.py``: table, CSV file and figure.
- ``language``: the demo on a causal language model.
"""
