"""What a picture of a pipeline's own size asks of a GPU for our kernels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastdiff.compiler.controlnets import StepControlNet
from fastdiff.compiler.steps import StepUNet
from fastdiff.errors import UserError
from fastdiff.kernels.dispatch import interpreted
from fastdiff.kernels.jobs import Job, job_of
from fastdiff.models import Decoder, Encoder, Loan, Unsupported
from fastdiff.recipes import decodes_in_float32
from fastdiff.runtime.planned import (
    Run,
    coding,
    control,
    guided_steps,
    kernels_of,
    step,
    without_memory,
)

TOKENS = 77
"""Of a prompt, which CLIP's text encoders fill up."""
SIDE, FACTOR = 64, 8
"""Of the latents of a model that names no size, and pixels to a side of one."""


def runs_of(
    networks: Iterable[Any], side: int, factor: int, upcast: bool, guided: bool = True
) -> list[Run]:
    """What a picture asks of the compact networks that slots hold.

    Args:
        networks: `StepUNet`, `StepControlNet` or `adapters.Coder`; others ask for nothing of ours.
        side: of the latents.
        factor: pixels of a latent's side.
        upcast: whether diffusers turns a float16 autoencoder into float32 to draw with it.
        guided: whether by classifier-free guidance.
    """
    runs: list[Run] = []
    for network in networks:
        own, sides = getattr(network, "network", network), (side, side)
        if isinstance(network, StepUNet):
            bare = without_memory(own)
            runs.append(step(bare, network.dtype, sides, TOKENS, guided))
            runs += guided_steps(bare, sides, guided)
        elif isinstance(network, StepControlNet):
            runs.append(control(without_memory(own), sides, TOKENS))
        elif isinstance(own, Decoder | Encoder):
            dtype = own.conv_in.weight.dtype
            if upcast and dtype == torch.float16:
                dtype = torch.float32
            pixels = 1 if isinstance(own, Decoder) else factor
            runs.append(coding(without_memory(own, dtype), dtype, (side * pixels, side * pixels)))
    return runs


def own_size(target: Any) -> tuple[int, int, bool]:
    """`runs_of`'s side, factor and upcast of a pipeline or a bare model, of its own size."""
    bare_vae = hasattr(target, "post_quant_conv")
    vae: Any = target if bare_vae else getattr(target, "vae", None)
    factor = FACTOR if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    if bare_vae:
        return int(vae.config.sample_size) // factor, factor, False
    unet: Any = getattr(target, "unet", None) or target
    side = getattr(unet.config, "sample_size", None) or SIDE  # a ControlNet has none
    return side if isinstance(side, int) else max(side), factor, decodes_in_float32(target)


def jobs_of(
    unet: nn.Module,
    vae: nn.Module,
    dtype: torch.dtype,
    archs: Iterable[int],
    side: int,
    factor: int,
    upcasts: Iterable[bool],
) -> list[Job]:
    """What to compile for pictures of a pipeline on several architectures, with guidance and
    without it.

    Args:
        unet, vae: diffusers' own, on the meta device.
        upcasts: values of `runs_of`'s that there may be; the rest is as there.

    Raises:
        UserError: fastdiff computes none of the networks.
    """
    from fastdiff.compiler.adapters import parts

    if interpreted():
        raise UserError("Triton's interpreter compiles nothing; run without TRITON_INTERPRET")
    networks: list[Any] = []
    for name, (module, kind) in (parts(unet) | parts(vae)).items():
        cast = nn.Module.to(module, dtype=dtype)
        try:
            networks.append(kind.borrow(cast, Loan(cast, rehearsal=True)))
        except Unsupported as reason:
            raise UserError(f"fastdiff does not compute the {name}: {reason}") from None
    runs = [
        run
        for guided in (True, False)
        for upcast in upcasts
        for run in runs_of(networks, side, factor, upcast, guided)
    ]
    return [job_of(launch, arch) for arch in archs for launch in kernels_of(runs, arch)]
