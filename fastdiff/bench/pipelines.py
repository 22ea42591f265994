"""Loading a pipeline folder, and what can be asked of the pipeline."""

import re
from pathlib import Path
from typing import Any

import torch

from fastdiff.bench.saved import check_folder
from fastdiff.devices import refusal
from fastdiff.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The diffusers pipeline saved in `folder`, its weights as `dtype` on `device`: the one that
    draws from a text, where another with the same components was saved.

    Reads local safetensors only. Raises UserError for anything that is not such a pipeline.
    """
    saved = check_folder(folder)
    from fastdiff.bench.presets import from_folder

    try:
        return from_folder(saved, dtype).to(device)
    except (ImportError, UserError):
        raise
    except Exception as error:  # a foreign file can be wrong in any way: say which, and where
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded: {reason}") from error


def check_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, the pipeline's own where None; UserError unless they fit.

    Sides are multiples of the VAE's factor and of 8, which diffusers asks of every pipeline.
    """
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    multiple = max(8, pipe.vae_scale_factor)
    height, width = (own if side is None else side for side in (height, width))
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            raise UserError(f"--{name} is {side}; this VAE needs a positive multiple of {multiple}")
    return height, width


def check_steps(pipe: Any, steps: int) -> None:
    """UserError where the scheduler was trained on fewer steps than are asked for."""
    most = getattr(pipe.scheduler.config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise UserError(f"--steps is {steps}; this scheduler has {most} steps at most")


def check_device(device: str | None) -> str:
    """`device`, or the fastest at hand where None; UserError where torch cannot use it."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device is {device!r}; choose cpu, cuda or cuda:N")
    if reason := refusal(device):
        raise UserError(f"--device {device} cannot be used here: {reason}")
    return device


def check_dtype(name: str | None, device: str) -> torch.dtype:
    """The torch dtype called `name`; where None float16 on a GPU, as models are published there,
    and float32 on a CPU. UserError for any other name."""
    name = name or ("fp16" if device.startswith("cuda") else "fp32")
    if name not in DTYPES:
        raise UserError(f"--dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
