"""Constants that rules and sources share."""

__all__ = ["LEAST_LENGTH"]

LEAST_LENGTH = 0.01
"""Root mean square below which parameters count as this long. LoRA's B starts at zero and must be free to leave it. It
is about what torch draws for a layer of 3,000 inputs."""
