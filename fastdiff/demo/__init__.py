"""The embedded demo: a small trained Stable Diffusion that turns a prompt into a 64×64 emoji.

Real weights, a real text encoder, no download: ``fastdiff bench`` and ``fastdiff generate`` use it
when no folder is given. ``README.md`` beside this file is the model card.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fastdiff import installed
from fastdiff.devices import refusal
from fastdiff.errors import UserError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionUpscalePipeline

DEMO_FOLDER: Path = Path(__file__).parent / "pipeline"
UNCONDITIONAL_FOLDER: Path = Path(__file__).parent / "unconditional"
"""A DDPMPipeline that draws pictures of 16×16 pixels from noise alone."""
UPSCALER_FOLDER: Path = Path(__file__).parent / "upscaler"
"""The U-Net of `load_upscaler`."""
SCALING_FACTOR = 0.08333  # StableDiffusionUpscalePipeline accepts no other
PROMPTS: tuple[str, ...] = ("red heart", "dog face", "purple car", "sunflower")


def load_demo(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> "StableDiffusionPipeline":
    """A fresh copy of the demo pipeline on `device`, its float16 weights cast to `dtype`.

    It draws [64, 64, 3] pictures from [4, 16, 16] latents; prompts are cut to 22 tokens. Pictures
    look cleanest with a guidance_scale of 3 to 4 and 25 steps of its DDIM scheduler.
    Raises ValueError if torch cannot compute in `dtype` on `device`, and ImportError if diffusers
    or transformers is not installed.
    """
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"load_demo's dtype is {dtype!r}; give torch.float32, bfloat16 or float16")
    if reason := refusal(device):
        raise UserError(f"load_demo's device {str(device)!r} cannot be used here: {reason}")
    if reason := refusal(device, dtype):
        raise UserError(
            f"load_demo's dtype {dtype} is not supported on {device} ({reason}); give"
            " torch.float32, bfloat16 or float16"
        )
    try:
        with quiet():
            from diffusers import StableDiffusionPipeline

            load: Any = StableDiffusionPipeline.from_pretrained
            pipe: Any = load(DEMO_FOLDER, dtype=dtype, local_files_only=True)
    except ImportError as error:
        raise ImportError(
            f"the demo pipeline needs diffusers and transformers ({error});"
            f" {installed.pip('diffusers')}"
        ) from error
    return cast("StableDiffusionPipeline", pipe.to(device))


def load_upscaler(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> "StableDiffusionUpscalePipeline":
    """A fresh pipeline that enlarges the demo's kind of pictures by four, from 16×16 to 64×64.

    Its U-Net is trained for it; the other parts are the demo's. Raises as `load_demo` does.
    """
    demo: Any = load_demo(dtype, device)
    with quiet():
        from diffusers import UNet2DConditionModel

        load: Any = UNet2DConditionModel.from_pretrained
        unet: Any = load(UPSCALER_FOLDER, torch_dtype=dtype, local_files_only=True)
    return upscaler(demo, unet.to(device))


def upscaler(demo: Any, unet: Any) -> "StableDiffusionUpscalePipeline":
    """The upscaling pipeline of `unet` and of `demo`'s other parts, which are not copied.

    The class insists on its own scaling factor, so the autoencoder's decoder takes it in.
    """
    from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline

    demo.vae.register_to_config(scaling_factor=SCALING_FACTOR)
    with torch.no_grad():
        demo.vae.post_quant_conv.weight.mul_(SCALING_FACTOR)
    build: Any = StableDiffusionUpscalePipeline
    pipe: Any = build(
        vae=demo.vae,
        text_encoder=demo.text_encoder,
        tokenizer=demo.tokenizer,
        unet=unet,
        low_res_scheduler=cast("Any", DDPMScheduler)(beta_schedule="scaled_linear"),
        scheduler=demo.scheduler,
        max_noise_level=unet.config.num_class_embeds - 1,
    )
    return cast("StableDiffusionUpscalePipeline", pipe)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and advice (no torchvision, …) while importing and loading."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for log in logs:
                log.set_verbosity_error()
                log.disable_progress_bar()
            yield
        finally:
            for log, (verbosity, bar) in zip(logs, before, strict=True):
                log.set_verbosity(verbosity)
                if bar:
                    log.enable_progress_bar()
