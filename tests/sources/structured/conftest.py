from __future__ import annotations

import pytest

from tests.integrations.lora import QUIET


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore the warning that PEFT causes by reading a deprecated property."""
    for item in items:
        if "sources/structured" in item.nodeid:
            item.add_marker(QUIET)
