"""Draws a whole picture with another runtime's networks, and compares it with torch's."""

import inspect
import math
from collections import namedtuple
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff.engines.bound import Engine
from fastdiff.export.parts import Part
from fastdiff.families.part import PACKED
from fastdiff.families.texts import embedded
from fastdiff.recipes import PICTURES, denoiser, needs_picture, side_of

STEPS, PROMPT, TOKENS, NEGATIVE = 4, "red heart", 60, 20
"""Settings of the picture; the last two are the lengths of texts that are given as embeddings."""

Run = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
"""Runs a network of another runtime: CPU tensors by input name -> outputs in the part's order."""


def run_of(engine: Engine, part: Part) -> Run:
    """A function that calls an engine, each time on new memory."""

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        sizes = part.sizes(shapes)
        bound = engine.bind(shapes, {port.name: port.at(sizes) for port in part.outputs})
        for name, tensor in inputs.items():
            bound.inputs[name].copy_(tensor)
        bound.run()
        return tuple(bound.outputs[port.name].cpu() for port in part.outputs)

    return run


@contextmanager
def inside(pipe: Any, parts: tuple[Part, ...], runs: Mapping[str, Run]) -> Iterator[Any]:
    """The pipeline with its networks' calls answered by `runs`; restored after the block."""
    answers: list[tuple[Any, str, Callable[..., Any]]] = []
    for part in parts:
        run = runs[part.folder]
        if part.folder.startswith("text_encoder"):
            answers.append((getattr(pipe, part.folder), "forward", _text(part, run)))
        elif any(port.name == "timestep" for port in part.inputs):
            answers.append((getattr(pipe, part.folder), "forward", _denoised(part, run)))
        elif part.folder == "vae_decoder":
            answers.append((pipe.vae, "decode", _decode(run)))
    try:
        for module, name, answer in answers:
            setattr(module, name, answer)
        yield pipe
    finally:
        for module, name, _ in answers:
            vars(module).pop(name, None)


@contextmanager
def _unchecked(pipe: Any) -> Iterator[None]:
    checker = getattr(pipe, "safety_checker", None)
    if checker is None:
        yield
        return
    pipe.safety_checker = None
    try:
        yield
    finally:
        pipe.safety_checker = checker


def _denoised(part: Part, run: Run) -> Callable[..., tuple[Tensor, ...]]:
    """Called as by diffusers' pipelines; with guidance they repeat one timestep."""
    timestep = part.inputs[1]
    names = inspect.signature(type(part.net).forward)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        given = names.bind(part.net, *args, **kwargs).arguments
        given = part.told(given | (given.get("added_cond_kwargs") or {}))
        first = torch.as_tensor(given["timestep"], dtype=torch.float32).reshape(-1)[:1]
        given["timestep"] = first.reshape(timestep.at({}))
        dtypes = {port.name: getattr(torch, port.dtype) for port in part.inputs}
        inputs = {name: given[name].to(dtype).contiguous() for name, dtype in dtypes.items()}
        (sample,) = run(inputs)
        return _sample((part.returned(sample),))

    return forward


def _decode(run: Run) -> Callable[..., tuple[Tensor, ...]]:
    return lambda latents, **_: _sample(run({"latent_sample": latents.contiguous()}))


def _sample(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An output that some pipelines read by name, others by index."""
    make: Any = namedtuple
    named: tuple[Tensor, ...] = make("output", ["sample"])(*found)
    return named


def _text(part: Part, run: Run) -> Callable[..., Any]:
    names = [port.name for port in part.outputs]
    first = [name for name in names if not name.startswith("hidden_states.")]
    make: Any = namedtuple  # diffusers reads it by index and by name
    output = make("output", [*first, "hidden_states"])

    def forward(input_ids: Tensor, **told: Any) -> Any:
        given = {"input_ids": input_ids} | told
        tensors = run({port.name: given[port.name].contiguous() for port in part.inputs})
        return output(*tensors[: len(first)], tensors[len(first) :])

    return forward


def _size(pipe: Any, parts: tuple[Part, ...]) -> dict[str, int]:
    """Height and width in pixels of the first case of its network; {} if a file has one size."""
    found = [part for part in parts if any(p.name == "timestep" for p in part.inputs)]
    factor = getattr(pipe, "vae_scale_factor", 0)
    if not (found and factor):
        return {}
    own = found[0].cases[0]
    if found[0].packed:
        side = math.isqrt(own[PACKED]) * found[0].packed
        own = {"height": side, "width": side}
    return {side: factor * own[side] for side in ("height", "width") if side in own}


def _pictures(pipe: Any, takes: Collection[str]) -> dict[str, Tensor]:
    """What the call draws from: a picture of the pipeline's own size in [0, 1], and a mask of its
    right half; {} if it can do without."""
    if not needs_picture(type(pipe)):
        return {}
    side = side_of(pipe) * pipe.vae_scale_factor
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(side) >= side // 2).float().expand(1, 1, side, side)
    given = dict.fromkeys(PICTURES, picture) | {"mask_image": mask}
    return {name: tensor for name, tensor in given.items() if name in takes}


def psnr(pipe: Any, parts: tuple[Part, ...], runs: Mapping[str, Run]) -> float:
    """The PSNR in dB of the picture drawn by `runs` against torch's, for pixels from 0 to 1.

    Both use the same seed. Infinite if they are equal, minus infinity if one is not finite. The
    safety checker is left out: it could black out both pictures and so make them equal.
    """

    def draw_one() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {
            "num_inference_steps": STEPS,
            "generator": generator,
            "output_type": "pt",
        }
        takes = inspect.signature(type(pipe).__call__).parameters
        if "use_resolution_binning" in takes:  # the file has one size
            options["use_resolution_binning"] = False
        options |= _size(pipe, parts) if "height" in takes else {}
        options |= _pictures(pipe, takes)
        if "prompt" in takes:
            options |= embedded(pipe, takes, TOKENS, NEGATIVE) or {"prompt": PROMPT}
        elif "class_labels" in takes and takes["class_labels"].default is inspect.Parameter.empty:
            options["class_labels"] = [0]
        elif getattr(denoiser(pipe).config, "num_class_embeds", None) is not None:
            options["class_labels"] = 0
        # DDPM's pipelines always return numpy
        return torch.as_tensor(pipe(**options).images).double()

    pipe.set_progress_bar_config(disable=True)
    with _unchecked(pipe):
        torchs = draw_one()
        with inside(pipe, parts, runs):
            ours = draw_one()
    squares = float((torchs - ours).square().mean())
    if squares == 0.0:
        return math.inf
    return -10.0 * math.log10(squares) if math.isfinite(squares) else -math.inf
