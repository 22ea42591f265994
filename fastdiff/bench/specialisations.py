"""How many kernels Triton compiles before the first picture of a pipeline, found without a GPU.

A kernel that is compiled anew for every width, flag or missing bias makes a new machine wait a
third of a second for each; one that takes them as arguments is compiled once.
"""

from collections import Counter

import torch

from fastdiff.bench.graph import guided
from fastdiff.bench.presets import PRESETS, autoencoder, blueprint
from fastdiff.kernels.contract import Launch
from fastdiff.kernels.inspect import launches
from fastdiff.kernels.planned import distinct
from fastdiff.models.borrow import Loan
from fastdiff.models.vae import borrow_decoder, borrow_encoder
from fastdiff.runtime.planned import coding, kernels_of

MOST = 30
"""That a pipeline may need."""
PIPELINES = ("sd15", "sdxl", "sd3")
"""SD3 has no network here yet: the kernels' cases of its sizes stand for it."""
TOKENS = 77
SD3_CASES = ("sd3", "sdxl-cfg")
"""Its guided step is as SDXL's."""


def needed(pipeline: str, arch: int, dtype: torch.dtype) -> list[Launch]:
    """A launch of each specialisation that a guided step, decoding and encoding a picture need.

    pipeline: of PIPELINES, at its own size.
    """
    found: list[Launch] = []
    net, side = blueprint(pipeline)
    vae = autoencoder(PRESETS[pipeline])
    if pipeline == "sd3":
        cases = launches(arch, (dtype,), None)
        found += [launch for _, case, _, launch in cases if case.name.startswith(SD3_CASES)]
    else:
        found += kernels_of([guided(net, dtype, side, TOKENS)], arch)
    torch.nn.Module.to(vae, dtype=dtype)
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder, rehearsal=True))
    encoder = borrow_encoder(vae.encoder, Loan(vae.encoder, rehearsal=True))
    decoding = coding(decoder, dtype, (side, side))
    found += kernels_of([decoding, coding(encoder, dtype, (8 * side, 8 * side))], arch)
    return distinct(found)


def counted(pipeline: str, arch: int, dtype: torch.dtype) -> dict[str, int]:
    """How many of `needed` are of each kernel, by name, the most first."""
    kernels = Counter(launch.kernel.__name__ for launch in needed(pipeline, arch, dtype))
    return dict(kernels.most_common())
