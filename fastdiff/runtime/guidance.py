"""A loop's inputs for each step besides the conditions: guidance, and what a mask keeps."""

from typing import NamedTuple

from torch import Tensor


class Guidance(NamedTuple):
    """How a step combines the network's outputs. With two outputs for each latent the first is
    unconditional, with three the last is perturbed (a perturbed attention, or skipped layers)."""

    scale: float | Tensor = 1.0
    """guidance_scale: a number, or [n] one for each step. Two outputs of which the second is
    perturbed, with a scale of w, have a guidance scale of -w."""
    rescale: float = 0.0
    """guidance_rescale."""
    perturbed: float | Tensor = 0.0
    """How far the result moves away from a third output: a number, or [n] one for each step. If it
    is 0 the third output is not read."""


class Inpainting(NamedTuple):
    """The part of a picture that the steps do not change, noised for the next step."""

    mask: Tensor
    """[B or 1, C or 1, Y, X]: 1 where the picture is drawn, 0 where it is kept."""
    original: Tensor | None = None
    """[B, C, Y, X] the clean latents to keep. None: each step keeps the latents that it began
    with."""
    noise: Tensor | None = None
    """[B, C, Y, X] the noise of the original."""
    factors: Tensor | None = None
    """[n, 2] the factors of original and noise after each step."""

    def pictures(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Mask, original and noise, those that are given, each in the shape of `latents`."""
        given = (self.mask, self.original, self.noise)
        return tuple(picture.expand_as(latents) for picture in given if picture is not None)
