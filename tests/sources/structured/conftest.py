from __future__ import annotations

import pytest

from tests.integrations.lora import QUIET


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PEFT's own reading of a deprecated property is no error here."""
    for item in items:
        if "sources/structured" in item.nodeid:
            item.add_marker(QUIET)
