from array import array

def gram(
    table: array[int], kinds: bytes, lengths: array[int], rows: int, threads: int, known: bytes, /
) -> tuple[float, ...]: ...
def combine(
    table: array[int],
    kinds: bytes,
    lengths: array[int],
    rows: int,
    threads: int,
    into: array[int],
    coefficients: array[float],
    accumulate: bytes,
    stored: bytes,
    /,
) -> None: ...
