"""Spares torch the stacks that it notes for messages that no test reads."""

import traceback
from types import SimpleNamespace

import torch
from torch._subclasses import fake_tensor

NOTING = (torch.cuda, torch.xpu, torch.mtia, fake_tensor)
"""torch.manual_seed notes a stack for each kind of device that there is not, which takes a hundred
times as long as seeding the CPU's generator; each FakeTensorMode notes one, and tracing a network
makes one for each of its constants."""


def hasten() -> None:
    """Let those modules note empty stacks."""
    empty = {"format_stack": list, "extract_stack": list}
    for module in NOTING:
        module.traceback = SimpleNamespace(**vars(traceback) | empty)
