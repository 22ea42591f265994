"""The stand-in for a GPU, as a fixture."""

import pytest
from standin import standing_in


@pytest.fixture
def gpu(monkeypatch):
    with standing_in(monkeypatch) as gpu:
        yield gpu
