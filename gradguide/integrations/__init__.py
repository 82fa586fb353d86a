"""Helpers for other libraries, and recipes that the tests run.

- ``peft``: LoRA parameters by name and by layer.
- ``transformers``: metrics in Trainer's logs.
- ``sampling``: losses and text for :class:`gradguide.StructuredSource`, also exported by ``transformers``.
- ``lightning``, ``amp`` (mixed precision), ``fsdp`` (FSDP2): a complete script in each docstring.

Recipes for Trainer and Accelerate are in the README.
"""
