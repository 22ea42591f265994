"""How many kernels Triton compiles before the first picture of a pipeline, found without a GPU.

A kernel that is compiled anew for every width, flag or missing bias makes a new machine wait a
third of a second for each; one that takes them as arguments is compiled once.
"""

from collections import Counter

import torch

from fastdiff.bench.graph import guided
from fastdiff.bench.presets import PRESETS, autoencoder, blueprint
from fastdiff.kernels.contract import Launch
from fastdiff.models.borrow import Loan
from fastdiff.models.vae import borrow_decoder, borrow_encoder
from fastdiff.runtime.planned import coding, kernels_of

MOST = 30
"""That a pipeline may need."""
PIPELINES = ("sd15", "sdxl", "sd3", "sd35-medium", "sd35-large")


def needed(pipeline: str, arch: int, dtype: torch.dtype) -> list[Launch]:
    """A launch of each specialisation that a guided step, decoding and encoding a picture need.

    pipeline: of PIPELINES, at its own size.
    """
    net, side = blueprint(pipeline)
    vae = torch.nn.Module.to(autoencoder(PRESETS[pipeline]), dtype=dtype)
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder, rehearsal=True))
    encoder = borrow_encoder(vae.encoder, Loan(vae.encoder, rehearsal=True))
    decoding = coding(decoder, dtype, (side, side))
    encoding = coding(encoder, dtype, (8 * side, 8 * side))
    return kernels_of([guided(net, dtype, side), decoding, encoding], arch)


def counted(pipeline: str, arch: int, dtype: torch.dtype) -> dict[str, int]:
    """How many of `needed` are of each kernel, by name, the most first."""
    kernels = Counter(launch.kernel.__name__ for launch in needed(pipeline, arch, dtype))
    return dict(kernels.most_common())
