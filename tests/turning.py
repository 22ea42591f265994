"""diffusers' rotary embedding, computed in float64."""

from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def turned_in_float64(module):
    """In this block the transformers of `module` rotate heads in float64. diffusers rotates them in
    float32 whatever their dtype, which is not exact enough for a reference."""

    def turn(x, tables, sequence_dim):
        cos, sin = (table.double()[None, :, None, :] for table in tables)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin

    with patch.object(module, "apply_rotary_emb", turn):
        yield
