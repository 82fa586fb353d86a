"""Constants that rules and sources share."""

__all__ = ["LEAST_LENGTH"]

LEAST_LENGTH = 0.01
"""Lower bound for the root mean square of parameters in relative lengths. LoRA's B starts at zero and must be free to
grow. The value is about that of torch's default initialisation for 3,000 inputs."""
