"""Guidance by a part of the batch in which some layers differ: perturbed-attention guidance.

diffusers predicts for [unconditional, text, perturbed] at once, or without classifier-free guidance
for [text, perturbed]. It marks the perturbed layers by their attention processors for the time of a
call, so these are read again before every picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.kernels.concat import concat
from fastdiff.models.blocks import require
from fastdiff.models.switches import Switch
from fastdiff.models.watch import kind


@dataclass(frozen=True)
class Perturbed:
    """Which layers differ in the last of a batch's parts."""

    parts: int
    """2 or 3."""
    layers: frozenset[int]
    """The numbers of the layers."""
    shared: bool
    """Whether the last part has the same conditions as the part before it, so that both are
    equal up to the first of the layers."""

    def plain(self, batch: int) -> int:
        """The size of a batch of `batch` without its last part."""
        return batch - batch // self.parts

    def first(self, now: int, wanted: int, batch: int) -> int:
        """How many of a batch of `batch` a network begins with.

        Args:
            now: the number of its input pictures.
            wanted: the number that its other inputs require.
        """
        if now == batch or not self.shared:
            return batch
        return self.plain(batch) if wanted == batch else wanted


def perturbing(switches: Sequence[Switch], parts: Mapping[str, int]) -> dict[int, int]:
    """The layers that are perturbed now, by number, and into how many parts their processors divide
    the batch; arguments as for `perturbed_of`."""
    found = {i: parts.get(kind(switch.now), 0) for i, switch in enumerate(switches)}
    return {i: count for i, count in found.items() if count}


def perturbed_of(
    switches: Sequence[Switch],
    parts: Mapping[str, int],
    told: Tensor | None,
    shared: bool | None = None,
) -> Perturbed | None:
    """The perturbation that the attention processors of `switches` ask for now; None if none does.

    Args:
        parts: the number of parts by the perturbing processor's class.
        told: [batch, ...] the network's conditions.
        shared: see `Perturbed`.

    Raises:
        Unsupported: the processors contradict each other, or do not divide the batch.
    """
    layers = perturbing(switches, parts)
    if not layers:
        return None
    count, *more = {*layers.values()}
    require(not more, "perturbed attention with and without guidance at once")
    whole = told is not None and told.shape[0] % count == 0
    require(whole, f"perturbed attention in a batch that is not of {count} equal parts")
    return Perturbed(count, frozenset(layers), bool(shared))


def appended(x: Tensor, more: Tensor) -> Tensor:
    """[n, ...] and [m, ...], both contiguous -> [n + m, ...]."""
    return concat(x.reshape(1, -1), more.reshape(1, -1)).view(-1, *x.shape[1:])


def attention_to_text(
    q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_bias: Tensor | None
) -> Tensor:
    """The attention of a picture's tokens each to itself and to the text, [B, L, H, K].

    Arguments as for `joint_attention`. Scores are in float32 at least.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, text_k, text_v = (t.to(wide).transpose(1, 2) for t in (q, k, v, text_k, text_v))
    q = q * q.shape[-1] ** -0.5
    own, told = (q * k).sum(-1, keepdim=True), q @ text_k.transpose(2, 3)
    if text_bias is not None:
        told = told + text_bias
    weights = torch.cat([own, told], dim=-1).softmax(-1)
    seen = weights[..., :1] * v + weights[..., 1:] @ text_v
    return seen.transpose(1, 2).to(dtype).contiguous()
