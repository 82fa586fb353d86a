"""Count the operations of the pull, each of which is a launch on CUDA."""

from __future__ import annotations

from torch import nn

from benchmarks.growth import PULL_CALLS
from gradguide import StructuredSource
from gradguide.integrations.sampling import sampled_loss
from tests.operations import Operations
from tests.sources.structured.problems import adapted, llama, spread, text, trained


def operations(model: nn.Module) -> int:
    """Return the operations of a pull after the first one."""
    spread(model, 0.1)
    layers = len([module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"])
    source = StructuredSource.capture(llama(layers), text(12), sampled_loss, rank=8).bound(model)
    parameters = trained(model)
    source.refresh(parameters, [])
    found = Operations()
    with found:
        source.refresh(parameters, [])
    return len(found.names)


def test_the_number_of_operations_does_not_grow_with_the_layers() -> None:
    found = {operations(adapted(llama(layers))) for layers in (2, 3)}
    assert len(found) == 1
    assert found.pop() <= PULL_CALLS
