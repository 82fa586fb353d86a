from array import array

def gram(table: array[int], lengths: array[int], rows: int, threads: int, /) -> tuple[float, ...]: ...
def combine(
    table: array[int],
    lengths: array[int],
    rows: int,
    threads: int,
    into: array[int],
    coefficients: array[float],
    accumulate: bytes,
    /,
) -> None: ...
