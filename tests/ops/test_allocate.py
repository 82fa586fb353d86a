"""Memory for lists of tensors: zeros in one block per device and dtype, each tensor aligned."""

from __future__ import annotations

import torch

from gradguide.ops.allocate import ALIGNMENT, allocate_contiguous

SHAPES = [(3, 5), (), (0,), (64, 33), (1,)]


def test_shapes_and_dtypes_are_those_of_the_tensors() -> None:
    like = [torch.ones(shape, dtype=dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    made = allocate_contiguous(like)
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in like]
    assert all(t.is_contiguous() and not t.any() for t in made)


def test_tensors_are_aligned_and_do_not_overlap_in_one_block_per_dtype() -> None:
    like = [torch.ones(shape, dtype=dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    made = allocate_contiguous(like)
    assert len({t.untyped_storage().data_ptr() for t in made}) == 2
    start = {t.dtype: t.untyped_storage().data_ptr() for t in made}
    assert all((t.data_ptr() - start[t.dtype]) % ALIGNMENT == 0 for t in made if t.numel())
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(made))


def test_another_dtype_can_be_given() -> None:
    made = allocate_contiguous([torch.ones(2, dtype=torch.float16)], torch.float32)
    assert made[0].dtype == torch.float32
    assert allocate_contiguous([]) == []
