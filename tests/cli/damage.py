"""Damage safetensors files."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["flip_header_bits", "loads"]


def flip_header_bits(path: Path, whole: bytes, count: int) -> Iterator[None]:
    """Write the file ``whole`` to ``path`` ``count`` times, each with one random bit of its header flipped."""
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(0)
    for _ in range(count):
        damaged = bytearray(whole)
        damaged[chance.randrange(header)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        yield


def loads(load: Callable[[Path], object], path: Path) -> bool:
    """Return whether ``load`` reads the file. It refuses one with ValueError."""
    try:
        load(path)
    except ValueError:
        return False
    return True
