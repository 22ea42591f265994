"""`attention` as two library products around a softmax, for widths that no fused kernel suits.

It does a block of rows at a time, so that the scores stay in a GPU's L2 between the three launches.
Scores are float32 in every dtype; the weights are rounded to the dtype before the second product,
as in fused kernels.
"""

import torch
from torch import Tensor

from fastdiff.kernels.softmax import softmax

SCORES = 2**23
"""Scores per block: 32 MiB, less than the L2 of any GPU for which the products pay off."""


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    batch, length, heads, width = q.shape
    keys, scale = k.shape[1], width**-0.5 if scale is None else scale
    out = q.new_empty(q.shape)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    if mask is not None:
        mask = mask.expand(batch, heads, length, keys).flatten(0, 1)
    rows = max(1, SCORES // max(1, len(q) * keys))
    for start in range(0, length, rows):
        block = slice(start, start + rows)
        scores, left = _scores(q[:, block], k), scale
        if mask is not None:
            scores, left = scores.mul_(scale).add_(mask[:, block]), 1.0
        y = torch.bmm(softmax(scores, v, left), v)
        if heads == 1 and rows >= length:
            return y.unsqueeze(2)
        out[:, block] = y.unflatten(0, (batch, heads)).transpose(1, 2)
    return out


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q kᵀ in float32, or float64; q: [B·H, L, K], k: [B·H, Lk, K]."""
    if q.dtype in (torch.float32, torch.float64):
        return torch.bmm(q, k.mT)
    if q.device.type == "cpu":
        return torch.bmm(q.float(), k.float().mT)
    return torch.bmm(q, k.mT, out_dtype=torch.float32)
