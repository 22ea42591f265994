"""Hashes that tie a file to the network it was made from, and to its own bytes."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from fastdiff.families import settings


def of_network(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer in the state dict (name, dtype, shape, values), then of
    its `settings`: with another number of heads, equal weights compute something else."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(flat.cpu().numpy()))
    for setting in settings(module):
        digest.update(f"{setting}\n".encode())
    return digest.hexdigest()


def of_files(*paths: Path) -> str:
    """SHA-256 of the files' bytes, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
