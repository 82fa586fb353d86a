"""Helpers for other libraries, and recipes that the tests run.

- ``peft``: LoRA parameters by name and by layer.
- ``transformers``: ``guide(trainer)`` for Trainer and TRL's trainers, and metrics in their logs.
- ``lightning``: metrics in a module's loggers.
- ``sampling``: losses and text for :class:`gradguide.StructuredSource`, also exported by ``transformers``.
- ``drift``: the measured KL from the base model, also exported by ``transformers``.
- ``predictions``: the logits that ``sampling`` and ``drift`` read, and which positions count.
- ``causal``: loads a causal language model in its own dtype, for the command line and the demo.
- ``frameworks``: plugins for Axolotl, LLaMA-Factory, ms-swift and torchtitan, in the docstring.
- ``amp`` (mixed precision), ``fsdp`` (FSDP2): a complete script in each docstring, as in those above.

Recipes for Trainer and Accelerate are in the README.
"""
