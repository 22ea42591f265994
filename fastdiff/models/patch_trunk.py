"""What transformers on patches share whose conditions are not part of the stream: DiT, PixArt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import repeated, require
from fastdiff.models.borrow import Weights
from fastdiff.models.patches import Patches, Positions
from fastdiff.models.stream import Stream


@dataclass(frozen=True)
class PatchTrunk:
    """Latents become patches [B, L, p·p, C]; the prediction may have as many channels again, for
    the variance."""

    patches: Patches
    positions: Positions
    eps: float
    """The eps of the last norm."""
    proj_out: Weights

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, L, p·p, C]."""
        return self._in_patches(self.patches.pack(latents))

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """[B, L, p·p, C] -> [B, C, Y, X]."""
        return self.patches.unpack(x.flatten(2), sides)

    def embed(self, x: Tensor, count: int, position: Tensor) -> Stream:
        """[B, L, p·p, C] as a stream [count, L, D]."""
        with scope("patches"):
            x = repeated(x.flatten(2), count)
            x = linear(x, self.patches.embed.weight, self.patches.embed.bias)
            return Stream(x, total=position)

    def out(self, picture: Stream, vectors: Tensor) -> Tensor:
        """The stream and [B, 2·D] shift and scale -> [B, L, p·p, C or 2·C]."""
        with scope("out"):
            shift, scale = vectors.chunk(2, 1)
            h = picture.normed(self.eps, shift, scale)
            return self._in_patches(linear(h, self.proj_out.weight, self.proj_out.bias))

    def check_out(self, channels: int, patch: int) -> None:
        """Raise Unsupported unless the last layer's columns are patches of these channels."""
        size, own = self.patches.size, self.patches.channels
        require(patch == size, f"patches of {size} that are put together as others")
        wide = self.proj_out.weight.shape[0]
        require(
            wide == channels * size**2 and channels in (own, 2 * own),
            f"a last layer of {wide} columns for {channels} channels",
        )

    def _in_patches(self, x: Tensor) -> Tensor:
        """[B, L, p·p·C] -> [B, L, p·p, C]."""
        cut: Tensor = x.unflatten(2, (self.patches.size**2, -1))
        return cut
