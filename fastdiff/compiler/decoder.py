"""Another runtime's VAE decoder, so that the bench can time its whole picture beside ours."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.engines import opened
from fastdiff.engines import exported, fingerprint
from fastdiff.engines.bound import Bound
from fastdiff.errors import UserError

PART = "vae_decoder"


def take_decoder(pipe: Any, backend: str, folder: Path) -> None:
    """Replace `pipe.vae.decode` by the decoder that `fastdiff export --onnx` wrote.

    The VAE's weights are compared only once, now. Raises UserError if the folder has no decoder, or
    one of another VAE.
    """
    vae = pipe.vae
    part = exported.part(folder, PART)
    if part["network_sha256"] != fingerprint.of_network(vae):
        raise UserError(f"{folder} holds the decoder of another VAE; export again")
    ((latents, (kind, *_)),) = part["inputs"].items()
    ((pixels, (_, _, channels, *_)),) = part["outputs"].items()
    dtype: torch.dtype = getattr(torch, kind)
    engine = opened(backend, folder / part["file"], vae.device, dtype)
    factor = int(pipe.vae_scale_factor)
    bound: dict[torch.Size, Bound] = {}

    def decode(z: Tensor, return_dict: bool = False) -> tuple[Tensor, ...]:
        if z.shape not in bound:
            batch, _, height, width = z.shape
            sides = (batch, channels, factor * height, factor * width)
            bound[z.shape] = engine.bind({latents: z.shape}, {pixels: sides})
        mine = bound[z.shape]
        mine.inputs[latents].copy_(z)
        mine.run()
        return (mine.outputs[pixels].to(z.dtype, copy=True),)  # the next run overwrites it

    vae.decode = decode
