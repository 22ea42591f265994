"""The memory of all live tensors, for tests that check that it does not grow."""

import gc

import torch

KINDS = (torch.Tensor, torch.nn.Parameter)
"""Exact types: the fake tensors that an export leaves behind take no memory."""


def live_bytes() -> int:
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in KINDS]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
