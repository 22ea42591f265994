"""Drawing one picture with a stopwatch, and taking turns in random order."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastdiff.recipes import denoiser

T = TypeVar("T")
GUIDANCE_SCALE = 4.0  # above 1, so that every step runs the batch of two that users run


@dataclass(frozen=True)
class Request:
    """What every backend draws. `latents` [1, C, H/f, W/f] float32: the same noise for all."""

    prompt: str
    steps: int
    height: int
    width: int
    latents: torch.Tensor
    seed: int


@dataclass(frozen=True)
class Drawing:
    """One picture, [H, W, 3] in [0, 1], and what it took.

    step_ms: the pipeline up to its latents, over the number of steps; encoding the prompt is in
    it. image_ms: that and the VAE. text_ms: until the last text encoder had its outputs.
    decode_ms: the VAE. On a GPU the first of these two is the stream's, the second the host's.
    """

    image: torch.Tensor
    step_ms: float
    image_ms: float
    text_ms: float
    decode_ms: float


def draw(pipe: Any, request: Request) -> Drawing:
    """Draw and time one picture. What is timed is what the receipt looks at."""
    device = pipe.device
    generator = torch.Generator("cpu").manual_seed(request.seed)
    latents = request.latents.to(device, denoiser(pipe).dtype)
    start = clock(device)
    with _encoded(pipe, device) as text_ms:
        latents = pipe(
            request.prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=generator,
            latents=latents,
            output_type="latent",
        ).images
    denoised = clock(device)
    vae = pipe.vae
    with torch.no_grad():
        shift = vae.config.get("shift_factor") or 0.0
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + shift
        image = vae.decode(scaled, return_dict=False)[0]
    end = clock(device)
    picture = (image[0].double() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu()
    return Drawing(
        picture,
        step_ms=1e3 * (denoised - start) / request.steps,
        image_ms=1e3 * (end - start),
        text_ms=text_ms(),
        decode_ms=1e3 * (end - denoised),
    )


@contextmanager
def _encoded(pipe: Any, device: torch.device) -> Iterator[Callable[[], float]]:
    """A function: ms from now until the last call of a text encoder within the block had ended."""
    marks = [_mark(device)]
    hooks = [
        module.register_forward_hook(lambda *_: marks.append(_mark(device)))
        for name, module in pipe.components.items()
        if name.startswith("text_encoder") and module is not None
    ]

    def spent() -> float:
        first, last = marks[0], marks[-1]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return float(first.elapsed_time(last)) if len(marks) > 1 else 0.0
        return 1e3 * float(last - first)

    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def _mark(device: torch.device) -> Any:
    """Now: on the GPU's stream, which is not made to wait for it; else on the host."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def picture(pipe: Any, height: int, width: int, steps: int, output_type: str = "latent") -> None:
    """Draw for the work of it: what counters count, guided as users guide. Sides in pixels."""
    pipe.set_progress_bar_config(disable=True)
    pipe(
        "red heart",
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type=output_type,
    )


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, once everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(
    runs: Mapping[str, Callable[[], T]],
    rounds: int,
    seed: int,
    after_round: Callable[[int, dict[str, list[T]]], object] = lambda done, results: None,
) -> dict[str, list[T]]:
    """Run everything once a round, in an order drawn anew each round; results by name and round.

    `after_round(done, results)` hears of each round, and what all rounds so far have given.

    A slow minute then slows all alike: sequential blocks on a busy machine cry wolf in one
    comparison of five.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    with _no_gc():
        for done in range(1, rounds + 1):
            shuffle(order)
            for name in order:
                results[name].append(runs[name]())
            after_round(done, results)
    return results


@contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
