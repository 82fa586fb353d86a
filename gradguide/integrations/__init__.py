"""Other libraries: ``peft`` (LoRA parameters by name), ``transformers`` (metrics in Trainer's logs)."""
