"""The arguments of a pipeline's call for one picture, by the names that it takes."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.enlarged import channels_of, size_of
from fastdiff.bench.pixels import decodes_with
from fastdiff.families.texts import embedded
from fastdiff.recipes import denoiser, factor_of, guides_with

GUIDANCE_SCALE = 4.0  # above 1, so that every step has a batch of two, as for most users
CLASS, TOKENS, ENLARGING_STEPS = 207, 60, 2
"""A class of ImageNet; the tokens of a text that is given as an embedding; the steps of loops after
the one that is timed."""


@dataclass(frozen=True)
class Request:
    """The picture that every backend draws. `latents` [1, C, H/f, W/f] or [1, D] float32: the same
    noise for all."""

    prompt: str
    steps: int
    height: int
    width: int
    latents: Tensor
    seed: int


def latents_of(pipe: Any, height: int, width: int, seed: int) -> Tensor:
    """Noise for a picture of that size in pixels, or for an embedding; empty if only the
    pipeline itself knows its shape."""
    config, factor = denoiser(pipe).config, factor_of(pipe)
    shape: tuple[int, ...] = (1, int(config.get("embedding_dim") or 0))
    if "sample_size" in config:
        shape = (1, channels_of(pipe), height // factor, width // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gives_latents(pipe: Any) -> bool:
    """Whether it takes and returns latents, so that its autoencoder can be timed separately."""
    own = getattr(pipe, "vae", None) is not None and "sample_size" in denoiser(pipe).config
    return own and "latents" in _takes(pipe)


def arguments(pipe: Any, request: Request, output_type: str) -> dict[str, Any]:
    """The arguments of its call; a text is given as an embedding if it has no text encoder."""
    takes, config = _takes(pipe), denoiser(pipe).config
    dtype, device = denoiser(pipe).dtype, pipe.device

    def noise(*shape: int, seed: int) -> Tensor:
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return made.to(device, dtype)

    latents = request.latents.to(device, dtype)
    given: dict[str, Any] = {
        "num_inference_steps": request.steps,
        "decoder_num_inference_steps": request.steps,
        "super_res_num_inference_steps": ENLARGING_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "decoder_guidance_scale": GUIDANCE_SCALE,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        **({"latents": latents, "decoder_latents": latents} if latents.numel() else {}),
        "output_type": output_type,
        "use_resolution_binning": False,
        **(size_of(pipe, request.height, request.width)),
    }
    if guides_with(takes) == "true_cfg_scale":  # which needs a negative prompt
        del given["guidance_scale"]
        given |= {"true_cfg_scale": GUIDANCE_SCALE, "negative_prompt": " "}
    if "super_res_latents" in takes:
        last = pipe.super_res_last.config
        side = last.sample_size
        given["super_res_latents"] = noise(1, last.in_channels // 2, side, side, seed=2)
        embedding = noise(1, pipe.text_proj.config.clip_embeddings_dim, seed=1)
        given["image_embeddings"] = embedding
    elif "negative_image_embeds" in takes:
        for seed, name in enumerate(("image_embeds", "negative_image_embeds"), 1):
            given[name] = noise(1, config.encoder_hid_dim, seed=seed)
    elif "class_labels" in takes:
        given["class_labels"] = [CLASS]
    else:
        given |= embedded(pipe, takes, TOKENS) or {"prompt": request.prompt}
    return {name: value for name, value in given.items() if name in takes}


def whole(pipe: Any, request: Request) -> Tensor:
    """The result of a pipeline that decodes by itself: a picture [H, W, 3] float64 in [0, 1], or an
    embedding [D]."""
    kind = "np" if decodes_with(pipe) is not None or _draws(pipe) else "pt"
    made = pipe(**arguments(pipe, request, kind), return_dict=False)[0]
    return torch.as_tensor(made[0]).double().cpu()


def _draws(pipe: Any) -> bool:
    return "sample_size" in denoiser(pipe).config


def _takes(pipe: Any) -> Any:
    return inspect.signature(pipe.__call__).parameters
