"""Prepares and checks each backend, then times them against each other."""

import copy
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastdiff.bench.backends import (
    ON_ENGINES,
    ON_ONNX,
    READERS,
    Unavailable,
    check_backend,
    check_ran,
    prepare,
)
from fastdiff.bench.calls import latents_of
from fastdiff.bench.contenders import files, sharing
from fastdiff.bench.memory import Baseline, baseline, engine_peak_bytes, peak_bytes
from fastdiff.bench.receipt import Truth, check, find_truth, run_step
from fastdiff.bench.results import Timed
from fastdiff.bench.room import wants_memory
from fastdiff.bench.stats import speedup
from fastdiff.bench.timing import Drawing, Request, draw, interleave
from fastdiff.errors import UserError
from fastdiff.recipes import autoencoder, decodes_in_float32, denoiser

Racer = Callable[[], Drawing]


@dataclass(frozen=True)
class Settings:
    """What to draw and how often. `device` as in torch; sizes in pixels."""

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
    """Backends requested by name: if one cannot run, that is an error instead of a row."""
    engines: Path | None = None
    """The folder that `fastdiff export` wrote for this pipeline."""


def bench(
    pipe: Any,
    settings: Settings,
    log: Callable[[str], object] = lambda line: None,
    keep: Callable[[list[Timed]], object] = lambda rows: None,
) -> list[Timed]:
    """One row per backend of `settings`, in that order.

    `pipe` is on the CPU and becomes the eager baseline on `settings.device`. A backend is timed
    only if its receipt passes. `log` receives progress; `keep` receives the rows so far: after each
    backend's preparation and, from the second on, after each round. A backend that raises during
    its preparation gets a row that says so.

    Raises UserError before anything is timed if a requested backend cannot run here.
    """
    device = torch.device(settings.device)
    before = baseline(device)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if decodes_in_float32(pipe) and pipe.vae.dtype == torch.float16:
        pipe.vae.to(torch.float32)
    request = _request(pipe, settings)
    for name in settings.asked:
        try:
            check_backend(name, pipe, settings.engines)
        except Unavailable as reason:  # before the reference, which can take minutes
            raise UserError(f"--backends {name} cannot run here: {reason}") from reason
    log("reference: eager and float64")
    truth = find_truth(pipe, request)
    rows: dict[str, Timed] = {}
    racers: dict[str, Racer] = {}
    with files(pipe, settings.engines, log) as engines:
        trial = _Trial(pipe, settings, request, truth, before, engines, log)
        for name in settings.backends:
            log(f"{name}: preparing and checking")
            rows[name], racer = trial.contender(name)
            if racer is not None:
                racers[name] = racer
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


@dataclass(frozen=True)
class _Trial:
    """What every backend is prepared with and checked against before it is timed."""

    pipe: Any
    settings: Settings
    request: Request
    truth: Truth
    before: Baseline
    """The memory in use before the pipeline was on its device; eager is measured from it."""
    engines: Callable[[], tuple[Path, float]]
    log: Callable[[str], object]

    def contender(self, name: str) -> tuple[Timed, Racer | None]:
        """Prepare and check a backend: its row, and a function that draws if it may be timed."""
        row, copied, before = Timed(self.settings.case, name), self.pipe, self.before
        try:
            check_backend(name, self.pipe, self.settings.engines)
            read = self.engines() if name in ON_ONNX else (self.settings.engines, 0.0)
            if name != "eager":
                before = baseline(self.pipe.device)
                shares = self.pipe.device.type == "cpu" and name in READERS
                copied = sharing(self.pipe) if shares else copy.deepcopy(self.pipe)
            row = _prepare(row, copied, self.request, self.truth, before, *read)
        except (Unavailable, UserError) as reason:
            return _unavailable(row, str(reason), self.settings), None
        except Exception as error:  # one backend's failure must not lose the others' times
            if wants_memory(error):
                if name == "eager":  # nothing to compare with
                    raise
                return _unavailable(row, NO_ROOM, self.settings), None
            self.log(traceback.format_exc())
            words = (str(error).strip().splitlines() or ["without a message"])[0]
            return replace(row, unavailable=f"it broke: {type(error).__name__}: {words}"), None
        return row, None if row.failed else partial(draw, copied, self.request)


NO_ROOM = "not enough memory beside the backends prepared before it; choose fewer backends"


def _unavailable(row: Timed, reason: str, settings: Settings) -> Timed:
    """The row with the reason; UserError if its backend was requested."""
    if row.backend in settings.asked:
        raise UserError(f"--backends {row.backend} cannot run here: {reason}")
    return replace(row, unavailable=reason)


def _request(pipe: Any, settings: Settings) -> Request:
    return Request(
        prompt=settings.prompt,
        steps=settings.steps,
        height=settings.height,
        width=settings.width,
        latents=latents_of(pipe, settings.height, settings.width, settings.seed),
        seed=settings.seed,
    )


def _prepare(
    row: Timed,
    pipe: Any,
    request: Request,
    truth: Truth,
    before: Baseline,
    engines: Path | None,
    exported_s: float,
) -> Timed:
    """Prepare `pipe` for the row's backend, draw with it until it is warm, check what it drew.

    exported_s: the seconds it took to write `engines`, for each backend that reads them.
    """
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
        peak_mem_bytes=_peak(row.backend, pipe, before, lambda: draw(pipe, request)),
        prepare_s=exported_s + max(0.0, cold_s - warm_s),
    )


def _peak(backend: str, pipe: Any, before: Baseline, draw: Callable[[], object]) -> int | None:
    if backend not in ON_ENGINES:
        return peak_bytes(pipe, before, draw)
    if pipe.device.type == "cpu":
        engines = [part for part in (denoiser(pipe), autoencoder(pipe)) if part is not None]
        return engine_peak_bytes(pipe, before, draw, engines)
    return None  # torch does not see the library's memory


def _with_speed(row: Timed, drawings: list[Drawing], eager: list[Drawing]) -> Timed:
    fields = ("step_ms", "image_ms", "text_ms", "decode_ms")
    decoded = any(drawing.decode_ms for drawing in drawings)
    steps, images, texts, decodes = ([getattr(d, field) for d in drawings] for field in fields)
    return replace(
        row,
        steps_per_s=1e3 / median(steps),
        images_per_s=1e3 / median(images),
        ratio_vs_eager=speedup([d.step_ms for d in eager], steps),
        image_ratio_vs_eager=speedup([d.image_ms for d in eager], images),
        decode_ratio_vs_eager=speedup([d.decode_ms for d in eager], decodes) if decoded else None,
        samples_ms=tuple(steps),
        image_samples_ms=tuple(images),
        text_samples_ms=tuple(texts) if decoded else (),
        decode_samples_ms=tuple(decodes) if decoded else (),
    )
