"""From a pipeline and a list of backends to rows: prepare and check each, then race them."""

import copy
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastdiff.bench.backends import ON_ENGINES, Unavailable, check_ran, prepare
from fastdiff.bench.memory import Baseline, baseline, peak_bytes
from fastdiff.bench.receipt import Truth, check, find_truth, run_step
from fastdiff.bench.results import Timed
from fastdiff.bench.stats import speedup
from fastdiff.bench.timing import Drawing, Request, draw, interleave
from fastdiff.errors import UserError
from fastdiff.recipes import decodes_in_float32, denoiser


@dataclass(frozen=True)
class Settings:
    """What to draw and how often. `device` as torch names it; sides in pixels."""

    case: str
    backends: tuple[str, ...]
    device: str
    steps: int
    height: int
    width: int
    rounds: int
    seed: int
    prompt: str
    asked: tuple[str, ...] = ()
    """Backends that were asked for by name: one that cannot run is no row, but an error."""
    engines: Path | None = None
    """What `fastdiff export` wrote for this pipeline."""


def bench(
    pipe: Any,
    settings: Settings,
    log: Callable[[str], object] = lambda line: None,
    keep: Callable[[list[Timed]], object] = lambda rows: None,
) -> list[Timed]:
    """One row per backend of `settings`, in that order.

    `pipe` is on the CPU and becomes the eager baseline on `settings.device`. A backend is timed
    only if its receipt is green; `log` hears what is under way, `keep` the rows as far as they are
    known: after each backend's preparation and, from the second on, after each round. A backend
    that raises while it is prepared is a row that says so.

    Raises UserError where one that was asked for cannot run here, before anything is timed.
    """
    device = torch.device(settings.device)
    before = baseline(device)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if pipe.vae.dtype == torch.float16 and decodes_in_float32(pipe):
        pipe.vae.to(torch.float32)
    request = _request(pipe, settings)
    log("reference: eager and float64")
    truth = find_truth(pipe, request)
    rows: dict[str, Timed] = {}
    racers: dict[str, Callable[[], Drawing]] = {}
    for name in settings.backends:
        log(f"{name}: preparing and checking")
        if name != "eager":
            before = baseline(device)
        contender = pipe if name == "eager" else copy.deepcopy(pipe)
        row = Timed(settings.case, name)
        try:
            rows[name] = _prepare(row, contender, request, truth, before, settings.engines)
        except Unavailable as reason:
            if name in settings.asked:
                sentence = f"--backends {name} cannot run here: {reason}"
                raise UserError(sentence) from reason
            rows[name] = replace(row, unavailable=str(reason))
        except UserError:
            raise
        except Exception as error:  # it must not take the others' times with it
            log(traceback.format_exc())
            words = (str(error).strip().splitlines() or ["without a word"])[0]
            rows[name] = replace(row, unavailable=f"it broke: {type(error).__name__}: {words}")
        else:
            if not rows[name].failed:
                racers[name] = lambda contender=contender: draw(contender, request)  # type: ignore[misc]
        keep(list(rows.values()))

    def timed(drawings: dict[str, list[Drawing]]) -> list[Timed]:
        eager = drawings["eager"]
        speeds = {name: _with_speed(rows[name], own, eager) for name, own in drawings.items()}
        return list((rows | speeds).values())

    def after_round(done: int, drawings: dict[str, list[Drawing]]) -> None:
        log(f"timing: round {done} of {settings.rounds}")
        if done > 1:  # one sample has no interval
            keep(timed(drawings))

    return timed(interleave(racers, settings.rounds, settings.seed, after_round))


def _request(pipe: Any, settings: Settings) -> Request:
    factor = pipe.vae_scale_factor
    channels = denoiser(pipe).config.in_channels
    shape = (1, channels, settings.height // factor, settings.width // factor)
    return Request(
        prompt=settings.prompt,
        steps=settings.steps,
        height=settings.height,
        width=settings.width,
        latents=torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed)),
        seed=settings.seed,
    )


def _prepare(
    row: Timed, pipe: Any, request: Request, truth: Truth, before: Baseline, engines: Path | None
) -> Timed:
    """Prepare `pipe` for the row's backend, draw with it until it is warm, check what it drew."""
    start = time.perf_counter()
    prepare(row.backend, pipe, engines)
    draw(pipe, request)
    check_ran(row.backend, pipe)
    cold_s = time.perf_counter() - start
    start = time.perf_counter()
    drawing = draw(pipe, request)
    warm_s = time.perf_counter() - start
    return replace(
        row,
        receipt=check(drawing.image, run_step(denoiser(pipe), truth.step), truth),
        # an engine's memory is its own library's, which torch does not see
        peak_mem_bytes=None
        if row.backend in ON_ENGINES
        else peak_bytes(pipe, before, lambda: draw(pipe, request)),
        prepare_s=max(0.0, cold_s - warm_s),
    )


def _with_speed(row: Timed, drawings: list[Drawing], eager: list[Drawing]) -> Timed:
    steps, images = ([getattr(d, field) for d in drawings] for field in ("step_ms", "image_ms"))
    return replace(
        row,
        steps_per_s=1e3 / median(steps),
        images_per_s=1e3 / median(images),
        ratio_vs_eager=speedup([d.step_ms for d in eager], steps),
        image_ratio_vs_eager=speedup([d.image_ms for d in eager], images),
        samples_ms=tuple(steps),
        image_samples_ms=tuple(images),
    )
