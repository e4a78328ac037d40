"""What all checks of the contract share."""

import pytest

from polyhead.nn import routed_heads


@pytest.fixture(autouse=True)
def _rows_are_packed_however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks are small, and must go the way that long sequences go."""
    monkeypatch.setattr(routed_heads, "SHORT", 0)
