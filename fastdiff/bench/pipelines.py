"""Loads a pipeline folder, and checks requests against the pipeline."""

import math
import re
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fastdiff.bench.saved import Saved, check_folder
from fastdiff.devices import refusal
from fastdiff.errors import UserError
from fastdiff.recipes import denoiser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The diffusers pipeline saved in `folder`, its weights cast to `dtype`, on `device`. If
    another pipeline with the same components was saved, the one that draws from text.

    Reads only local safetensors. Raises UserError for anything else.
    """
    saved = check_folder(folder)
    try:
        return _read(saved, dtype).to(device)
    except (ImportError, UserError):
        raise
    except Exception as error:  # a foreign file can be wrong in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded: {reason}") from error


def _read(saved: Saved, dtype: torch.dtype) -> Any:
    """Load the pipeline of a checked folder to the CPU, without output.

    Raises UserError if a file lacks weights of a network: transformers would draw them at random,
    and diffusers leave them without memory.
    """
    import diffusers
    import transformers

    from fastdiff.demo import quiet

    shared: Any = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    with quiet():
        given = dict.fromkeys(saved.absent)
        for net in saved.networks:
            if net.library == "transformers":
                read: Any = getattr(transformers, net.kind).from_pretrained
                given[net.folder.name], told = read(
                    net.folder, variant=net.variant, output_loading_info=True, **shared
                )
                _need_all(net.folder, told["missing_keys"])
        pipeline: Any = getattr(diffusers, saved.pipeline)
        pipe = pipeline.from_pretrained(saved.folder, variant=saved.variant, **shared, **given)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            weights = chain(module.named_parameters(), module.named_buffers())
            _need_all(saved.folder / name, [key for key, weight in weights if weight.is_meta])
    return pipe


def _need_all(folder: Path, missing: Collection[str]) -> None:
    if missing:
        raise UserError(
            f"{folder}: its weights lack {min(missing)}, one of {len(missing)} that its config.json"
            " requires; save or copy it again"
        )


def check_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default the pipeline's own; UserError unless they fit.

    Both must be multiples of the VAE's factor and of 8, as in every diffusers pipeline. For a
    transformer they must be whole patches, and at most as many as it has positions.
    """
    config, factor = denoiser(pipe).config, pipe.vae_scale_factor
    patch = config.get("patch_size") or 1
    own, multiple = config.sample_size * factor, max(8, factor) * patch
    most = (config.get("pos_embed_max_size") or math.inf) * factor * patch
    height, width = (own if side is None else side for side in (height, width))
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            raise UserError(
                f"--{name} is {side}; this pipeline needs a positive multiple of {multiple}"
            )
        if side > most:
            raise UserError(f"--{name} is {side}; this pipeline has positions for {most} at most")
    return height, width


def check_steps(pipe: Any, steps: int) -> None:
    """UserError if `steps` exceeds the scheduler's number of training steps."""
    most = getattr(pipe.scheduler.config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise UserError(f"--steps is {steps}; this scheduler has {most} steps at most")


def check_device(device: str | None) -> str:
    """`device`, by default the fastest available; UserError if torch cannot use it."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device is {device!r}; choose cpu, cuda or cuda:N")
    if reason := refusal(device):
        raise UserError(f"--device {device} cannot be used here: {reason}")
    return device


def check_dtype(name: str | None, device: str) -> torch.dtype:
    """The torch dtype called `name`; by default float16 on a GPU, as models are published, and
    float32 on a CPU. UserError for any other name."""
    name = name or ("fp16" if device.startswith("cuda") else "fp32")
    if name not in DTYPES:
        raise UserError(f"--dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
