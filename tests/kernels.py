"""Check whether the kernels can run: on a GPU if available, else in Triton's interpreter."""

from __future__ import annotations

import torch

from gradguide.ops.available import lacks_triton

__all__ = ["HAVE_KERNELS"]

HAVE_KERNELS = lacks_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is None
