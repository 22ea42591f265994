"""The backends that a bench compares: a name, and a function that prepares a copy of a pipeline."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff.errors import UserError
from fastdiff.recipes import autoencoder, denoiser, recipe_of


class Unavailable(Exception):
    """This backend cannot run on this machine; the message says why and is shown in its row."""


def eager(pipe: Any) -> None:
    """The baseline: diffusers unchanged."""


def channels_last(pipe: Any) -> None:
    """Eager, with NHWC weights and activations in the convolutions."""
    denoiser(pipe).to(memory_format=torch.channels_last)
    if (vae := autoencoder(pipe)) is not None:
        vae.to(memory_format=torch.channels_last)


def inductor(pipe: Any) -> None:
    """torch.compile, with default settings, of the denoising network and the VAE's decoder."""
    _inductor(pipe, "default")


def inductor_max_autotune(pipe: Any) -> None:
    """torch.compile in the mode that searches kernels and captures CUDA graphs for minutes."""
    _inductor(pipe, "max-autotune")


def _inductor(pipe: Any, mode: str) -> None:
    on_gpu = pipe.device.type == "cuda"
    if on_gpu and find_spec("triton") is None:
        raise Unavailable("torch.compile needs triton on a GPU, and it is not installed")
    if not on_gpu:
        _need_compiler()
    denoiser(pipe).compile(mode=mode)
    if (vae := autoencoder(pipe)) is not None:
        vae.decoder.compile(mode=mode)


def fastdiff(pipe: Any) -> None:
    """`fastdiff.compile` with its defaults, which are lossless."""
    _compile(pipe)


def networks(pipe: Any) -> None:
    """fastdiff's networks in diffusers' own denoising loop, to show what the plan adds."""
    _compile(pipe, ignore=("loop",))


def ort(pipe: Any, engines: Path) -> None:
    """The denoising network in ONNX Runtime within fastdiff's plan, and the VAE's decoder."""
    _read(pipe, "ort", engines)


def openvino(pipe: Any, engines: Path) -> None:
    """The denoising network in OpenVINO within fastdiff's plan, and the VAE's decoder."""
    _read(pipe, "openvino", engines)


def _read(pipe: Any, backend: str, engines: Path) -> None:
    from fastdiff.compiler.decoder import take_decoder

    _compile(pipe, backend=backend, engines=engines, ignore=("vae",))
    try:
        take_decoder(pipe, backend, engines)
    except UserError as error:
        raise Unavailable(str(error)) from error


def tensorrt(pipe: Any, engines: Path) -> None:
    """The denoising network as a TensorRT engine within fastdiff's plan."""
    _compile(pipe, backend="tensorrt", engines=engines)


BACKENDS: dict[str, Callable[..., None]] = {
    "eager": eager,
    "channels_last": channels_last,
    "inductor": inductor,
    "inductor-max-autotune": inductor_max_autotune,
    "networks": networks,
    "fastdiff": fastdiff,
    "ort": ort,
    "openvino": openvino,
    "tensorrt": tensorrt,
}


ON_ONNX = ("ort", "openvino")
"""Backends that read the ONNX files of `fastdiff export`; without any, the bench exports them."""
ON_ENGINES = (*ON_ONNX, "tensorrt")
"""Backends that accept the folder which `fastdiff export` wrote for the pipeline."""
READERS = (
    *("channels_last", "inductor", "inductor-max-autotune", "networks", "fastdiff"),
    *ON_ENGINES,
)
"""Backends that do not write to weights: on a CPU they can share eager's memory."""


def check_backend(name: str, pipe: Any, engines: Path | None = None) -> None:
    """Unavailable if a backend that reads ONNX files cannot run at all, or not from the folder
    `engines`; checks before the export."""
    if name in ON_ONNX:
        from fastdiff.compiler.engines import check_runtime, exported_part

        dtype, recipe = denoiser(pipe).dtype, recipe_of(pipe)
        try:
            check_runtime(name, pipe.device, dtype)
            if engines is not None and recipe is not None:
                exported_part(engines, recipe.denoiser, dtype)
        except UserError as error:
            raise Unavailable(str(error)) from error


def prepare(name: str, pipe: Any, engines: Path | None = None) -> None:
    """Make `pipe` run on a backend; Unavailable if that is impossible here."""
    if name in ON_ENGINES:
        BACKENDS[name](pipe, engines)
    else:
        BACKENDS[name](pipe)


def check_ran(name: str, pipe: Any) -> None:
    """Unavailable if `pipe` has drawn, but not on the engine: it refuses the picture's size."""
    if name in ON_ENGINES:
        from fastdiff.compiler.slot import slot_of

        slot = slot_of(denoiser(pipe))
        if slot is not None and slot.eager:
            raise Unavailable(f"the network ran eagerly: {'; '.join(slot.eager)}")


def choose(names: str) -> tuple[str, ...]:
    """The backends in a comma-separated list, with eager first since every ratio is to it."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in BACKENDS]
    if unknown or not asked:
        got = repr(unknown[0]) if unknown else "empty"
        raise UserError(f"--backends is {got}; choose from {', '.join(BACKENDS)}")
    return tuple(dict.fromkeys(["eager", *asked]))


def _compile(pipe: Any, **options: Any) -> None:
    from fastdiff.compiler import Options, compile

    try:
        compile(pipe, Options(**options))
    except UserError as error:
        raise Unavailable(str(error)) from error


def _need_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise Unavailable("torch.compile needs a C++ compiler and found none") from error
