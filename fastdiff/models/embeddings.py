"""Embeddings of timesteps (sinusoids, then two linear layers) and of pooled texts."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan, Weights, kind


@dataclass(frozen=True)
class Sinusoid:
    """Sinusoids of timesteps: [...] -> [..., width], as in Attention Is All You Need; float32."""

    width: int
    cosine_first: bool
    shift: float
    scale: float = 1.0
    """The factor of the angles."""

    def __call__(self, timesteps: Tensor) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10000.0) * steps / (half - self.shift))
        angles = self.scale * (timesteps[..., None].float() * frequencies)
        parts = (angles.cos(), angles.sin()) if self.cosine_first else (angles.sin(), angles.cos())
        return F.pad(torch.cat(parts, dim=-1), (0, self.width % 2))


@dataclass(frozen=True)
class Embedding:
    """Two linear layers, an activation between them; the LCM condition is added to the input."""

    first: Weights
    second: Weights
    condition: Weights | None
    act: str = "silu"

    def __call__(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and self.condition is not None:
            x = linear(condition, self.condition.weight, self.condition.bias) + x
        h = linear(x, self.first.weight, self.first.bias, act=self.act)
        return linear(h, self.second.weight, self.second.bias)


def borrow_sinusoid(module: Any, loan: Loan) -> Sinusoid:
    """From a Timesteps module."""
    time = loan.open(module, "Timesteps")
    told = time.num_channels, time.flip_sin_to_cos, time.downscale_freq_shift
    return Sinusoid(*told, time.scale)


def borrow_embedding(module: Any, loan: Loan) -> Embedding:
    """From a TimestepEmbedding."""
    embedding = loan.open(module, "TimestepEmbedding")
    act = loan.activation(embedding.act, "an activation in the time embedding")
    require(embedding.post_act is None, "an activation after the time embedding")
    condition = embedding.cond_proj
    return Embedding(
        loan.linear(embedding.linear_1),
        loan.linear(embedding.linear_2),
        None if condition is None else loan.linear(condition),
        act,
    )


def embedded_times(
    sinusoid: Sinusoid, time: Embedding, timesteps: Tensor, dtype: torch.dtype, count: int
) -> Tensor:
    """[steps, n] -> [steps, 1, D] if n is 1, else [steps, count, D]; n divides `count`."""
    times = time(sinusoid(timesteps).to(dtype))
    many = times.shape[1]
    return times if many == 1 else times.repeat(1, count // many, 1)


@dataclass(frozen=True)
class TimeText:
    """The sum of a timestep's and a pooled text's embeddings, and of a distilled guidance's."""

    sinusoid: Sinusoid
    time: Embedding
    text: Embedding
    guidance: Embedding | None = None

    def __call__(self, timesteps: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """[steps, n], [B, D'] and [m] -> [steps, B, D]; n and m are 1 or divide B (k texts per
        timestep)."""
        device, told = pooled.device, (pooled.dtype, len(pooled))
        times = embedded_times(self.sinusoid, self.time, timesteps.to(device), *told)
        if self.guidance is not None and guidance is not None:
            scales = guidance.to(device)[None]
            times = times + embedded_times(self.sinusoid, self.guidance, scales, *told)
        return times + self.text(pooled)


def borrow_time_text(module: Any, loan: Loan) -> TimeText:
    """From a CombinedTimestepTextProjEmbeddings, or the one with guidance."""
    name = "CombinedTimestepGuidanceTextProjEmbeddings"
    both = loan.open(module, "CombinedTimestepTextProjEmbeddings", name)
    text = loan.open(both.text_embedder, "PixArtAlphaTextProjection")
    loan.silu(text.act_1, "an activation in the text embedding")
    sinusoid, time = (
        borrow_sinusoid(both.time_proj, loan),
        borrow_embedding(both.timestep_embedder, loan),
    )
    guidance = borrow_embedding(both.guidance_embedder, loan) if kind(module) == name else None
    for told in (time, guidance):
        require(told is None or told.condition is None, "a time embedding with a condition")
    pooled = Embedding(loan.linear(text.linear_1), loan.linear(text.linear_2), None)
    return TimeText(sinusoid, time, pooled, guidance)
