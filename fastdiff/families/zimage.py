"""Z-Image: diffusers' ZImageTransformer2DModel."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.unet import lora_scale
from fastdiff.families.zimage_file import TOKENS, for_file, most, part
from fastdiff.models import Loan
from fastdiff.models.blocks import require
from fastdiff.models.checks import refuse
from fastdiff.models.zimage import Conditions, ZImage, borrow_zimage, padded
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_zimage(module, loan), searches)


def _call(
    zimage: Denoiser,
    x: Sequence[Tensor],
    t: Tensor,
    cap_feats: Sequence[Tensor],
    return_dict: bool = True,
    controlnet_block_samples: Any = None,
    siglip_feats: Any = None,
    image_noise_mask: Any = None,
    patch_size: int = 2,
    f_patch_size: int = 1,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Transformer2DModelOutput | tuple[list[Tensor]]:
    """`ZImageTransformer2DModel.forward` on the compact network.

    No picture looks at another, so those of one size whose captions are padded to one length are
    computed together.
    """
    refuse(
        controlnet_block_samples=controlnet_block_samples,
        siglip_feats=siglip_feats,
        image_noise_mask=image_noise_mask,
    )
    lora_scale(joint_attention_kwargs, "joint_attention_kwargs")
    network: Any = zimage.network
    size = network.multiple
    require((patch_size, f_patch_size) == (size, 1), f"patches of {patch_size}, {f_patch_size}")
    plain = all(isinstance(one, Tensor) and one.ndim == 4 and one.shape[1] == 1 for one in x)
    require(plain, "its latents are not pictures [C, 1, Y, X]")
    fits = isinstance(t, Tensor) and t.shape == (len(x),) and len(cap_feats) == len(x) > 0
    require(fits, "its timesteps and captions are not one for each of the latents")
    dtypes = {one.dtype for one in x}
    require(dtypes == {zimage.network.dtype}, f"latents of {', '.join(map(str, dtypes))}")
    alike = defaultdict(list)
    for i, (one, caption) in enumerate(zip(x, cap_feats, strict=True)):
        require(isinstance(caption, Tensor) and caption.ndim == 2, "captions that are no [T, D]")
        alike[one.shape, padded(len(caption))].append(i)
    made: list[Any] = [None] * len(x)
    for which in alike.values():
        latents = torch.stack([x[i][:, 0] for i in which])
        given = Conditions(tuple(cap_feats[i] for i in which))
        for i, one in zip(which, zimage(latents, t[which], given), strict=True):
            made[i] = one[:, None]
    return Transformer2DModelOutput(sample=made) if return_dict else (made,)


def _scale(*_: Any, joint_attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers ignores a scale that is passed by position
    return lora_scale(joint_attention_kwargs, "joint_attention_kwargs")


def _planned(zimage: Denoiser, sizes: Sizes) -> list[Run]:
    return DENOISED.loop(without_memory(zimage.network), sizes)


def _example(net: ZImage, texts: int, tokens: int) -> Conditions:
    wide = net.caption.weight.shape[1]
    captions = tuple(empty(net.caption.weight, tokens, wide) for _ in range(texts))
    return Conditions(captions, negated=True)  # as in its pipeline


def _channels(net: ZImage) -> int:
    return net.patches.channels


def _exported(network: ZImage) -> None:
    """A file holds all of a Z-Image."""


def _multiple(net: Any) -> int:
    """The patch size."""
    patch: int = net.all_patch_size[0]
    return patch


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, ZIMAGE)}


DENOISED = Denoised(
    *(Conditions, _example, _channels, part, _exported, _multiple, TOKENS, most),
    for_file=for_file,
    float32=True,
)
ZIMAGE = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(models=("ZImageTransformer2DModel",), taken=_taken, denoised=DENOISED)
