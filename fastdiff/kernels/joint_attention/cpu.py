"""`joint_attention` on a CPU: one attention over what is put end to end."""

import torch
from torch import Tensor

from fastdiff.kernels.attention import cpu


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    pairs = ((q, text_q), (k, text_k), (v, text_v))
    all_q, all_k, all_v = (torch.cat(pair, 1) for pair in pairs)
    out = cpu.run(all_q, all_k, all_v, scale=scale)
    picture, text = out.split([q.shape[1], text_q.shape[1]], 1)
    # copies even where a slice is contiguous: the outputs of an op may not share memory
    return (
        picture.clone(memory_format=torch.contiguous_format),
        text.clone(memory_format=torch.contiguous_format),
    )
