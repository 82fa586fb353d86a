"""Metadata of lists of tensors: when it is kept, and which tensors a kernel can read by address."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from gradguide.ops.tensors import MetadataCache, addresses_of, metadata_of


def test_metadata_is_kept_for_the_same_tensors_alone_and_keeps_none_alive() -> None:
    cache, tensors = MetadataCache(), [torch.ones(2), torch.ones(3)]
    first = cache.of("a", tensors).metadata
    assert cache.of("a", list(tensors)).metadata is first
    tensors[0].data = torch.ones(1)
    assert list(cache.of("a", tensors).metadata.lengths) == [1, 3]  # type: ignore[union-attr]
    assert list(cache.of("a", [tensors[0], torch.ones(4)]).metadata.lengths) == [1, 4]  # type: ignore[union-attr]
    alive = weakref.ref(tensors[1])
    del tensors
    assert alive() is None


def test_metadata_of_mixed_tensors_is_none() -> None:
    found = metadata_of([torch.ones(2), torch.ones(4, 3, dtype=torch.bfloat16).t()])
    assert (list(found.lengths), found.dtype, found.plain) == ([2, 12], None, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
        lambda: torch.ones(2, 3).t(),
        lambda: torch.ones(1).expand(3),
        lambda: torch.ones(3).to_sparse(),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
    ],
)
def test_a_tensor_whose_memory_is_not_its_numbers_is_not_plain(make: Callable[[], torch.Tensor]) -> None:
    assert not metadata_of([torch.ones(2), make()]).plain


@pytest.mark.parametrize("make", [lambda: torch.ones(2, device="meta"), lambda: torch._efficientzerotensor(2)])
def test_a_tensor_without_memory_has_no_address(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    assert addresses_of([tensor], metadata_of([tensor])) is None
    assert addresses_of([torch.ones(0), torch.ones(2)], metadata_of([torch.ones(0), torch.ones(2)])) is not None
