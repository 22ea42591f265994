"""The kernels that a picture of a pipeline's own size launches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastdiff.compiler.parts import denoiser_name, parts
from fastdiff.errors import UserError
from fastdiff.families import Sizes
from fastdiff.kernels.dispatch import interpreted
from fastdiff.kernels.jobs import Job, job_of
from fastdiff.models import Loan, Unsupported
from fastdiff.recipes import autoencoder, decodes_in_float32
from fastdiff.runtime.planned import kernels_of

SIDE, FACTOR = 64, 8
"""The latents' side for a model whose config has no sample_size, and pixels per latent side."""


def own_size(target: Any) -> Sizes:
    """The sizes of a picture of the pipeline's or model's own size."""
    network: Any = getattr(target, denoiser_name(target), target)
    bare_vae = hasattr(network, "post_quant_conv")
    vae: Any = network if bare_vae else autoencoder(target)
    factor = FACTOR if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    if bare_vae:
        return Sizes(int(vae.config.sample_size) // factor, factor)
    side = getattr(network.config, "sample_size", None) or SIDE  # a ControlNet has no sample_size
    side = side if isinstance(side, int) else max(side)
    return Sizes(side, factor, upcast=decodes_in_float32(target))


def jobs_of(
    models: Iterable[nn.Module], dtype: torch.dtype, archs: Iterable[int], sizes: Iterable[Sizes]
) -> list[Job]:
    """The kernels to compile for pictures of a pipeline on several architectures.

    models: diffusers' own networks, on the meta device.

    Raises:
        UserError: fastdiff computes none of the networks.
    """
    if interpreted():
        raise UserError("Triton's interpreter compiles nothing; run without TRITON_INTERPRET")
    taken = [item for model in models for item in parts(model).items()]
    networks: list[tuple[Any, Any]] = []
    for name, (module, kind) in taken:
        cast = nn.Module.to(module, dtype=dtype)
        try:
            networks.append((kind, kind.borrow(cast, Loan(cast, rehearsal=True))))
        except Unsupported as reason:
            raise UserError(f"fastdiff does not compute the {name}: {reason}") from None
    runs = [
        run for size in sizes for kind, network in networks for run in kind.planned(network, size)
    ]
    return [job_of(launch, arch) for arch in archs for launch in kernels_of(runs, arch)]
