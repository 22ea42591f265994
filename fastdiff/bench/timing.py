"""Draws a picture and times it; interleaves several backends in random order."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.bench.calls import (
    GUIDANCE_SCALE,
    Request,
    arguments,
    gives_latents,
    whole,
)
from fastdiff.bench.pixels import decodes_with, drawn, draws_pixels

__all__ = ["GUIDANCE_SCALE", "Drawing", "Request", "clock", "draw", "interleave", "picture"]

T = TypeVar("T")


@dataclass(frozen=True)
class Drawing:
    """One picture, [H, W, 3] in [0, 1], and its times.

    step_ms: from the start to the latents, divided by the number of steps; includes encoding the
    prompt. image_ms: all of it, with the VAE. text_ms: until the last text encoder is done.
    decode_ms: the VAE. On a GPU text_ms is by the stream's clock, decode_ms by the host's.
    """

    image: torch.Tensor
    step_ms: float
    image_ms: float
    text_ms: float
    decode_ms: float


def draw(pipe: Any, request: Request) -> Drawing:
    """Draw and time one picture, the same one that the receipt checks."""
    device = pipe.device
    if not gives_latents(pipe):
        with _encoded(pipe, device) as text_ms, _decoded(pipe, device) as decode_ms:
            start = clock(device)
            picture = _whole(pipe, request)
            ms = 1e3 * (clock(device) - start)
            text, decoding = text_ms(), sum(decode_ms)
        return Drawing(picture, (ms - decoding) / request.steps, ms, text, decoding)
    start = clock(device)
    with _encoded(pipe, device) as text_ms:
        latents = pipe(**arguments(pipe, request, "latent")).images
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


def _whole(pipe: Any, request: Request) -> Tensor:
    """The picture of a pipeline that decodes it itself, or its embedding; see `calls.whole`."""
    return drawn(pipe, request.steps, request.seed) if draws_pixels(pipe) else whole(pipe, request)


@contextmanager
def _decoded(pipe: Any, device: torch.device) -> Iterator[list[float]]:
    """The ms of each call that the pipeline makes of its autoencoder's decoder in this block."""
    vae, spent = decodes_with(pipe), list[float]()
    if vae is None:
        yield spent
        return
    own, decode = vars(vae).get("decode"), vae.decode

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = clock(device)
        made = decode(*args, **kwargs)
        spent.append(1e3 * (clock(device) - start))
        return made

    vae.decode = timed
    try:
        yield spent
    finally:
        vars(vae).pop("decode")
        if own is not None:
            vae.decode = own


@contextmanager
def _encoded(pipe: Any, device: torch.device) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the ms from now to the end of the last text encoder's call."""
    marks = [_now(device)]
    hooks = [
        module.register_forward_hook(lambda *_: marks.append(_now(device)))
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


def _now(device: torch.device) -> Any:
    """The present time: on a GPU an event on its stream, which does not wait for it; else the
    host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def picture(pipe: Any, height: int, width: int, steps: int, output_type: str = "latent") -> None:
    """Draw without timing, for counters; with guidance, as for most users. Sizes in pixels."""
    pipe.set_progress_bar_config(disable=True)
    if draws_pixels(pipe):
        drawn(pipe, steps, seed=0)
        return
    own = torch.empty(0)  # the pipeline draws its noise itself
    request = Request("red heart", steps, height, width, own, 0)
    kind = output_type if gives_latents(pipe) else "np"
    pipe(**arguments(pipe, request, kind))


def clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, after everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(
    runs: Mapping[str, Callable[[], T]],
    rounds: int,
    seed: int,
    after_round: Callable[[int, dict[str, list[T]]], object] = lambda done, results: None,
) -> dict[str, list[T]]:
    """Run everything once per round, each round in a new random order; results by name and round.

    `after_round(done, results)` is called after each round with all results so far.

    A slow minute then slows everything alike. On a busy machine, sequential blocks give a false
    alarm in one of five comparisons.
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
