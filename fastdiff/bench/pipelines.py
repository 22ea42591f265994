"""Loads a pipeline's folder or file, and checks requests against the pipeline."""

import inspect
import math
import re
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from fastdiff.bench.enlarged import enlarges
from fastdiff.bench.saved import (
    Saved,
    check_folder,
    check_whole,
    drawn_from_text,
    need_no_picture,
)
from fastdiff.devices import refusal
from fastdiff.errors import UserError, first_line
from fastdiff.families import family
from fastdiff.recipes import denoiser, factor_of, recipe_of, side_of

FLOW = {
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
}
"""Schedulers of networks that predict a flow."""
DISPENSABLE = {"text_encoder_3"}
"""What diffusers can draw without: Stable Diffusion 3's T5."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    variant: str | None = None,
    to_export: bool = False,
) -> Any:
    """The diffusers pipeline saved in `folder`, its weights cast to `dtype`, on `device`. If
    another pipeline with the same components was saved, the one that draws from text. to_export:
    see `check_folder`.

    Reads only local safetensors, those of `variant` if there are any. Raises UserError for
    anything else.
    """
    saved = check_folder(folder, variant, to_export)
    try:
        return _read(saved, dtype).to(device)
    except (ImportError, UserError):
        raise
    except Exception as error:  # a foreign file can be wrong in any way: say which, and where
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from error


def on_disk(place: Path | str, variant: str | None) -> Path:
    """The folder `place`, or that of a hub id once its safetensors of `variant` are here.

    Raises UserError if the hub does not have it, or cannot be reached and nothing is cached.
    """
    if isinstance(place, Path):
        return place
    from diffusers import DiffusionPipeline

    try:
        download: Any = DiffusionPipeline.download
        return Path(download(place, variant=variant, use_safetensors=True))
    except ImportError:
        raise
    except Exception as error:  # of the hub, of the network, of the files there
        reason = shorten(str(error), 300, placeholder=" …") or type(error).__name__
        raise UserError(
            f"{place} is not a folder here, and the Hugging Face hub did not deliver it: {reason}"
        ) from error


def load_file(place: Path | str, config: str | None, dtype: torch.dtype) -> Any:
    """The pipeline in one .safetensors file, here or at an address of the hub, on the CPU.

    config: a folder or hub id whose configs and tokenizers it is read with; None: the hub id that
    diffusers finds by the file's weights. Raises UserError if it holds no pipeline that draws
    from text, or if weights are missing.
    """
    if isinstance(place, Path):
        check_whole(place)
    import diffusers
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        load_single_file_checkpoint,
    )

    from fastdiff.demo import quiet

    try:
        with quiet():
            if config is None:
                kind = fetch_diffusers_config(load_single_file_checkpoint(str(place)))
                config = str(kind["pretrained_model_name_or_path"])
            local = Path(config).is_dir()
            reader: Any = diffusers.DiffusionPipeline
            index = reader.load_config(config, local_files_only=local)
            pipeline: Any = getattr(diffusers, drawn_from_text(place, index))
            pipe = pipeline.from_single_file(
                str(place), config=config, dtype=dtype, local_files_only=local
            )
    except (ImportError, UserError):
        raise
    except Exception as error:
        how = "" if config is None else f" with the configs of {config}"
        reason = first_line(error)
        if "meta tensor" in reason:  # diffusers casts parts without weights
            reason = "it lacks weights that they ask for"
        raise UserError(f"{place} cannot be loaded{how}: {reason}") from error
    _need_weights(pipe, Path(place))
    recipe = recipe_of(pipe)
    assert recipe is not None
    need_no_picture(place, recipe.denoiser, denoiser(pipe).config)
    return pipe


def _read(saved: Saved, dtype: torch.dtype) -> Any:
    """Load the pipeline of a checked folder to the CPU, without output.

    Raises UserError if a file misses weights of a network: transformers would draw them at random,
    and diffusers would leave them without memory.
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
    _need_weights(pipe, saved.folder)
    return pipe


def _need_weights(pipe: Any, place: Path) -> None:
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            weights = chain(module.named_parameters(), module.named_buffers())
            _need_all(place / name, [key for key, weight in weights if weight.is_meta])


def _need_all(folder: Path, missing: Collection[str]) -> None:
    if missing:
        raise UserError(
            f"{folder}: its weights lack {min(missing)}, one of {len(missing)} that its config.json"
            " requires; save or copy it again"
        )


def schedulers(pipe: Any) -> dict[str, Any]:
    """The scheduler classes, by name, that can replace a pipeline's own: they read the same config,
    and interpret the network's prediction in the same way."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    own = type(pipe.scheduler).__name__
    recipe = recipe_of(pipe)
    plans = recipe.plans if recipe is not None else ()
    names = plans[0].schedulers if plans and plans[0].schedulers else (own,)
    if names == (own,):
        # EDM's networks predict something that the other schedulers interpret differently
        noise = {one.name for one in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
        for group in (noise | {"LCMScheduler", "TCDScheduler"}, FLOW):
            if own in group:
                names = tuple(sorted(group))
    classes = {name: getattr(diffusers, name) for name in names}
    # if a package that a scheduler needs is missing, diffusers has a placeholder under its name
    return {n: c for n, c in classes.items() if issubclass(c, diffusers.SchedulerMixin)}


def check_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default the pipeline's own; UserError unless they fit.

    An embedding has none: 0. Both must be multiples of the VAE's factor and of 8, as in every
    diffusers pipeline. For a transformer they must be whole patches, and at most as many as it has
    positions.
    """
    config, factor = denoiser(pipe).config, factor_of(pipe)
    if "height" not in inspect.signature(pipe.__call__).parameters and not enlarges(pipe):
        own = config.get("sample_size", 0) * factor
        for name, side in (("height", height), ("width", width)):
            if side not in (None, own):
                raise UserError(f"--{name} is {side}; this pipeline draws {own}×{own} pixels only")
        return own, own
    patch = _patch(pipe)
    own, multiple = side_of(pipe) * factor, max(8, factor) * patch
    most = (config.get("pos_embed_max_size") or math.inf) * factor * patch
    height, width = (own if side is None else side for side in (height, width))
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            raise UserError(
                f"--{name} is {side}; this pipeline needs a positive multiple of {multiple}"
            )
        if side > most:
            raise UserError(f"--{name} is {side}; this pipeline draws at most {most} pixels")
    return height, width


def _patch(pipe: Any) -> int:
    """Rows and columns of latents that its network takes as one token; 1 for a U-Net."""
    config, recipe = denoiser(pipe).config, recipe_of(pipe)
    if "block_out_channels" in config or recipe is None:
        return 1
    denoised = family(recipe.networks[recipe.denoiser]).denoised
    return 1 if denoised is None else denoised.multiple(denoiser(pipe))


def check_prompt(pipe: Any) -> None:
    """UserError unless the pipeline draws a picture of a prompt."""
    kind, takes = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    if not {"prompt", "height"} <= takes.keys():
        raise UserError(
            f"a {kind} does not draw from text alone; give a pipeline that does, or call it from"
            " Python"
        )
    own = sorted(name for name in pipe.components if name.startswith("text_encoder"))
    lacking = [name for name in own if getattr(pipe, name) is None]
    needed = {*lacking} - {*pipe._optional_components, *DISPENSABLE}
    if needed or (lacking and lacking == own):
        raise UserError(
            f"this {kind} has no {min(needed or lacking)}, which reads the prompt; save it with one"
        )


def check_steps(pipe: Any, steps: int) -> None:
    """UserError if `steps` exceeds the scheduler's number of training steps."""
    recipe = recipe_of(pipe)
    plans = recipe.plans if recipe is not None else ()
    scheduler = getattr(pipe, plans[0].scheduler if plans else "scheduler")
    most = getattr(scheduler.config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise UserError(f"--steps is {steps}; this scheduler allows at most {most} steps")


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
