"""What SD3's transformer and its ControlNets share: embeddings, modulations and blocks."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import Columns, repeated, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.checks import check_count, check_times, checked
from fastdiff.models.embeddings import TimeText, borrow_time_text
from fastdiff.models.joint import JointBlock
from fastdiff.models.patches import Patches, Positions, borrow_patches
from fastdiff.models.reads import Reader
from fastdiff.models.stream import Stream
from fastdiff.models.weights import project


def alike(text: Tensor) -> int:
    """How many tokens at the end of a text [B, T, D] are equal in every sample; at least 1.

    They stay equal through all blocks, since text has no positions. So one token replaces n equal
    ones if its key counts n times: exp(score + log n) = n · exp(score). SD3 without T5 has 256.
    """
    if text.is_meta:
        return 1
    same = (text == text[:, -1:]).all(-1).all(0).flip(0)
    return max(1, int(same.long().cumprod(0).sum()))


@dataclass(frozen=True)
class JointTrunk:
    """What MM-DiT and its ControlNets have in common."""

    patches: Patches | None
    """None if the input is another network's embedded patches."""
    positions: Positions | None
    time_text: TimeText
    modulation: Weights
    """The linear layers of all norms, which read the same embedding."""
    context: Weights | None
    """The text's embedding; None without a text."""
    blocks: tuple[JointBlock, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.modulation.weight.dtype

    @property
    def like(self) -> Tensor:
        """A weight on the device and of the dtype that inputs must have."""
        return self.time_text.text.first.weight

    @property
    def width(self) -> int:
        """Channels D of every token."""
        return self.modulation.weight.shape[1]

    def check_trunk(
        self, latents: Tensor, text: Tensor | None, pooled: Tensor | None, copies: int
    ) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it."""
        weight = self.like
        if self.patches is None:
            checked("hidden_states", latents, weight, self.width, 3)
        else:
            checked("hidden_states", latents, weight, self.patches.channels, 4)
            rows, columns = self.patches.counts(latents.shape[2:])
            require(min(rows, columns) > 0, f"latents of {list(latents.shape)} have no patch")
            side = max(rows, columns) if self.positions is None else self.positions.side
            require(
                max(rows, columns) <= side,
                f"latents of {list(latents.shape)} are larger than {side} by {side} patches",
            )
        if self.context is None:
            require(text is None, "it was given encoder_hidden_states")
        else:
            text = checked("encoder_hidden_states", text, weight, self.context.weight.shape[1], 3)
            check_count("encoder_hidden_states", text, latents, copies)
        wide = self.time_text.text.first.weight.shape[1]
        pooled = checked("pooled_projections", pooled, weight, wide, 2)
        check_count("pooled_projections", pooled, latents, copies)

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, L, p·p·C]; tokens [B, L, D] are returned unchanged."""
        return latents.contiguous() if self.patches is None else self.patches.pack(latents)

    def modulations(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """[steps, n] and [G·B, D''] -> [steps, G·B, all vectors]: one product for all steps."""
        with scope("modulation"):
            check_times(timesteps, len(pooled))
            embedded = F.silu(self.time_text(timesteps, pooled))
            return project(embedded, self.modulation)

    def texts(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """[G·B, T, D'] -> [G·B, T - n + 1, D] and the bias of the scores, for n equal tokens."""
        assert self.context is not None
        with scope("text"):
            count, bias = alike(text), None
            if count > 1:
                text = text[:, : text.shape[1] - count + 1]
                bias = torch.zeros(text.shape[1], device=text.device)
                bias[-1] = math.log(count)
            return linear(text.contiguous(), self.context.weight, self.context.bias), bias

    def embed(self, x: Tensor, batch: int, around: Tensor | None) -> Stream:
        """Patches [B, L, ...] as a stream [batch, L, D]; `around` is added to them."""
        with scope("patches"):
            x = repeated(x, batch)
            if self.patches is not None:
                x = linear(x, self.patches.embed.weight, self.patches.embed.bias)
            return Stream(x, total=around)


def borrow_joint_trunk(
    net: Reader, loan: Loan, rows: Columns, blocks: tuple[JointBlock, ...]
) -> dict[str, Any]:
    """The fields of a JointTrunk, from an SD3Transformer2DModel or SD3ControlNetModel. `rows` must
    have assigned the columns of all modulations."""
    patches = positions = None
    if net.pos_embed is not None:
        patches, positions = borrow_patches(net.pos_embed, loan)
    context = net.context_embedder
    return {
        "patches": patches,
        "positions": positions,
        "time_text": borrow_time_text(net.time_text_embed, loan),
        "modulation": loan.linear(*rows.layers, hoisted=True),
        "context": None if context is None else loan.linear(context),
        "blocks": blocks,
    }
