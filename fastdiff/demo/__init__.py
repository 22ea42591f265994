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
    from diffusers import StableDiffusionPipeline

DEMO_FOLDER: Path = Path(__file__).parent / "pipeline"
UNCONDITIONAL_FOLDER: Path = Path(__file__).parent / "unconditional"
"""A DDPMPipeline that draws pictures of 16×16 pixels from noise alone."""
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
