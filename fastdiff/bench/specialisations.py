"""How many kernels Triton compiles before a pipeline's first picture, found without a GPU.

If a kernel is compiled again for every width, flag or missing bias, a new machine waits a third of
a second each time; if they are run-time arguments, it is compiled once.
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
"""The most that a pipeline may need."""
PIPELINES = ("sd15", "sdxl", "sd3", "sd35-medium", "sd35-large")


def needed(pipeline: str, arch: int, dtype: torch.dtype) -> list[Launch]:
    """One launch of each specialisation that a guided step, encoding and decoding need.

    pipeline: one of PIPELINES, at its own size.
    """
    net, side = blueprint(pipeline)
    vae = torch.nn.Module.to(autoencoder(PRESETS[pipeline]), dtype=dtype)
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder, rehearsal=True))
    encoder = borrow_encoder(vae.encoder, Loan(vae.encoder, rehearsal=True))
    decoding = coding(decoder, dtype, (side, side))
    encoding = coding(encoder, dtype, (8 * side, 8 * side))
    return kernels_of([guided(net, dtype, side), decoding, encoding], arch)


def counted(pipeline: str, arch: int, dtype: torch.dtype) -> dict[str, int]:
    """The number of specialisations in `needed` by kernel name, the largest first."""
    kernels = Counter(launch.kernel.__name__ for launch in needed(pipeline, arch, dtype))
    return dict(kernels.most_common())
