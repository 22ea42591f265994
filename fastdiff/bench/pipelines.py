"""Loading a pipeline folder: every check that can be made before a weight is read."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import UserError

CLASSES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What a component's folder must hold, by how its name begins; any other is a network.
_FILES: dict[str, tuple[str, ...]] = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
}


def load(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The diffusers pipeline saved in `folder`, its weights as `dtype` on `device`.

    Reads local safetensors only. Raises UserError for anything that is not such a pipeline.
    """
    check_folder(folder)
    from fastdiff.bench.presets import from_folder

    try:
        return from_folder(folder, dtype).to(device)
    except ImportError:
        raise
    except Exception as error:  # a foreign file can be wrong in any way: say which, and where
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded: {reason}") from error


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` holds a complete pipeline of a class we know."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a pipeline saved with save_pretrained()")
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    index = _read_json(index_file)
    name = index.get("_class_name")
    if name not in CLASSES:
        raise UserError(f"{folder} holds a {name}; supported are {', '.join(CLASSES)}")
    for component, origin in index.items():
        if isinstance(origin, list) and len(origin) == 2 and origin[0] is not None:
            if origin[0] not in LIBRARIES:
                raise UserError(f"{index_file}: {component} comes from {origin[0]}, not a library")
            _check_component(folder / component)


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
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here: {reason}") from error
    return device


def check_dtype(name: str | None, device: str) -> torch.dtype:
    """The torch dtype called `name`; where None float16 on a GPU, as models are published there,
    and float32 on a CPU. UserError for any other name."""
    name = name or ("fp16" if device.startswith("cuda") else "fp32")
    if name not in DTYPES:
        raise UserError(f"--dtype is {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_component(folder: Path) -> None:
    files = next((f for kind, f in _FILES.items() if folder.name.startswith(kind)), None)
    for name in files or ("config.json",):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; save or copy the pipeline again")
    if files is None:
        _check_weights(folder)


def _check_weights(folder: Path) -> None:
    """Safetensors only: a .bin or .ckpt file is a pickle, which can run any code when read."""
    for index_file in folder.glob("*.safetensors.index.json"):
        for shard in set(_read_json(index_file).get("weight_map", {}).values()):
            if not (folder / shard).is_file():
                raise UserError(f"{folder / shard} is missing, though {index_file.name} names it")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt"))
    if pickles:
        raise UserError(
            f"{folder} holds only pickled weights ({pickles[0]}), which are never read; "
            "save it again with safe_serialization=True"
        )
    raise UserError(f"{folder} has no .safetensors file; save or copy the pipeline again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
