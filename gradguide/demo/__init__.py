"""The demo behind ``gradguide demo``: few-shot adaptation of a LoRA adapter, with and without GradGuide.

``run.prepare`` trains a source adapter and captures its source gradient, ``run.compare`` adapts it to the target with
any set of methods, ``run.run`` does both and writes the report. Nothing here is imported by the library itself.
"""
