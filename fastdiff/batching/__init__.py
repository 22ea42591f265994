"""Requests that join and leave a running batch between two steps (continuous batching).

>>> from fastdiff.batching import Batch, Request
>>> with Batch(fastdiff.compile(pipe), capacity=4) as batch:
...     tickets = [batch.submit(Request(prompt, seed=7)) for prompt in prompts]
...     pictures = [ticket.result() for ticket in tickets]
"""

from fastdiff import installed
from fastdiff.batching.requests import Cancelled, Request, Ticket

try:
    from fastdiff.batching.batch import Batch, Stats
except ModuleNotFoundError as missing:
    raise ImportError(
        f"fastdiff.batching needs {missing.name}; {installed.pip('batching')}"
    ) from missing

__all__ = ["Batch", "Cancelled", "Request", "Stats", "Ticket"]
