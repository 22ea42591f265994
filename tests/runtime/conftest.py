"""The stand-in for a GPU."""

import pytest
from standin import standing_in


@pytest.fixture
def gpu(monkeypatch):
    with standing_in(monkeypatch) as gpu:
        yield gpu
