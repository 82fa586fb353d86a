"""Other libraries: helpers, and recipes that the tests run as they stand.

``peft`` has LoRA parameters by name, ``transformers`` metrics in Trainer's logs. The docstrings of ``lightning``,
``amp`` (mixed precision) and ``fsdp`` (FSDP2) hold one whole file each. Trainer and Accelerate are in the README.
"""
