"""Compares requests that share a recorded step with other ways to draw them, on the demo.

    python -m benchmarks.batching check --requests 200 --minutes 30 --json check.json
    python -m benchmarks.batching speed --rounds 7 --json speed.json

`check` draws random requests (5 to 50 steps, guidance, scheduler, arrival) in a batch and compares
the latents of each with float64, within the error budget of the same request drawn alone. Requests
that do not fit into the minutes are reported, and the exit code is 1. `speed` times, in random
order, one picture after the other, batches that wait for their slowest picture, a batch that is
joined and left between steps, and one such batch for each core, with as many places in all.
"""

import argparse
import copy
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

import fastdiff
from benchmarks.clock import Budget
from fastdiff.batching import Batch, Request, Ticket
from fastdiff.batching.groups import Group
from fastdiff.batching.worker import Worker
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.bench.pixels import noise_as
from fastdiff.bench.stats import speedup
from fastdiff.demo import PROMPTS
from fastdiff.jsonable import finite
from fastdiff.kernels.contract import judge
from fastdiff.written import write_text

SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)
CAPACITY, WORKERS = 4, "workers"


def requests(
    pipe: Any, count: int, seed: int, least: int = 5, most: int = 50, unguided: float = 0.0
) -> Iterator[tuple[Request, float]]:
    """Random requests, each with the seconds to wait before it; a share of them `unguided`."""
    chosen = random.Random(seed)
    for number in range(count):
        name = chosen.choice(SCHEDULERS)
        kind = getattr(diffusers, name)
        request = Request(
            prompt=chosen.choice(PROMPTS),
            negative_prompt=chosen.choice([None, None, "dark"]),
            num_inference_steps=chosen.randint(least, most),
            # at 1 and below there is no guidance: another recording
            guidance_scale=1.0 if chosen.random() < unguided else chosen.uniform(1.5, 6),
            seed=seed * 1_000_000 + number,
            scheduler=kind.from_config(pipe.scheduler.config, skip_prk_steps=True),
        )
        yield request, chosen.choice([0.0, 0.0, 0.02, 0.1])


def called(pipe: Any, request: Request) -> Any:
    """The pipeline's own call for a request: latents [1, C, Y, X]."""
    before = pipe.scheduler
    pipe.scheduler = copy.deepcopy(request.scheduler or before)
    try:
        return pipe(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
        ).images
    finally:
        pipe.scheduler = before


def check(
    count: int,
    seed: int,
    capacity: int,
    least: int = 5,
    most: int = 50,
    *,
    workers: int = 1,
    minutes: float = math.inf,
) -> list[dict[str, Any]]:
    """Draw random requests in a batch; returns the result of each that was compared within the
    minutes, with `wrong`: why it is outside of its budget, if it is.

    The error budget has the same request drawn alone in place of eager: the error
    against float64 may be twice that of the picture drawn alone, plus one rounding.
    """
    budget = Budget(minutes)
    pipe = fastdiff.compile(fastdiff.load_demo())
    exact = fastdiff.load_demo().to(torch.float64)
    for one in (pipe, exact):
        one.set_progress_bar_config(disable=True)
    drawn: list[tuple[Request, Ticket, list[Any]]] = []
    with Batch(pipe, capacity, workers) as batch:
        for request, wait in requests(pipe, count, seed, least, most, unguided=0.3):
            time.sleep(wait)
            last: list[Any] = []

            def keep(step: int, steps: int, latents: Any, last: list[Any] = last) -> None:
                last[:] = [latents] if step == steps else []

            drawn.append((request, batch.submit(replace(request, on_step=keep)), last))
        for _, ticket, _ in drawn:
            ticket.result()
        stats = batch.stats()
    print(f"{count} requests in {stats.steps} steps, {stats.filled / stats.steps:.2f} at a time")
    found = []
    for request, ticket, (latents,) in drawn:
        if not budget.left_s > 0:
            break
        alone = called(pipe, request)
        exact.scheduler = request.scheduler  # whose noise is to be float32's, too
        with noise_as(exact, torch.float32):
            true = called(exact, request)
        verdict = judge("latents", latents, alone, true)
        why = f"drawn alone: {ticket.alone}" if ticket.alone else None
        if not verdict.passed:
            why = f"error {verdict.error:.2e}, allowed {verdict.allowed:.2e}"
        told = {"scheduler": type(request.scheduler).__name__, "guidance": request.guidance_scale}
        told |= {"steps": request.num_inference_steps, "seed": request.seed, "wrong": why}
        found.append(told | {"error": verdict.error, "allowed": verdict.allowed})
    return found


class Kept(Group):
    """Pictures that keep their places until the last of them is done."""

    most = 0

    def _count(self, device: torch.device) -> int:
        self.most = max(self.most, len(self.drawings))
        return self.most


class Patient(Worker):
    """Takes requests only when all earlier ones are done, and hands none over before."""

    group = Kept

    def __init__(self, *given: Any) -> None:
        self.notes: list[Callable[[], None]] = []
        """To be called when all are done."""
        super().__init__(*given)

    def _admit(self) -> bool:
        if not self.drawings:
            for note in self.notes:
                note()
            self.notes.clear()
        return super()._admit()

    def _room(self, begun: int) -> bool:
        if begun == 0:
            self._empty = not self.drawings
        return self._empty and begun < self.capacity


class Waiting(Batch):
    """A batch of pictures that wait for the slowest of them."""

    worker = Patient

    @property
    def notes(self) -> list[Callable[[], None]]:
        (worker,) = self._queue.workers
        assert isinstance(worker, Patient)
        return worker.notes


def in_turn(pipe: Any, asked: list[tuple[Request, float]]) -> list[float]:
    """One after the other, in this thread; the seconds that each had to wait for its picture."""
    taken, start, due = [], time.perf_counter(), 0.0
    for request, wait in asked:
        due += wait
        time.sleep(max(0.0, start + due - time.perf_counter()))
        before, pipe.scheduler = pipe.scheduler, copy.deepcopy(request.scheduler)
        pipe(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
        )
        pipe.scheduler = before
        taken.append(time.perf_counter() - start - due)
    return taken


def batched(
    kind: type[Batch], workers: int = 1
) -> Callable[[Any, list[tuple[Request, float]]], list[float]]:
    """A way to draw in a batch whose workers have `CAPACITY` places in all."""

    def draw(pipe: Any, asked: list[tuple[Request, float]]) -> list[float]:
        ends: dict[int, float] = {}
        with kind(pipe, max(1, CAPACITY // workers), workers) as batch:
            start, due, tickets = time.perf_counter(), 0.0, []
            for number, (request, wait) in enumerate(asked):
                due += wait
                time.sleep(max(0.0, start + due - time.perf_counter()))
                ticket, begun = batch.submit(request), due

                def note(number: int = number, begun: float = begun) -> None:
                    ends[number] = time.perf_counter() - start - begun

                def drawn(_: Ticket, note: Callable[[], None] = note) -> None:
                    batch.notes.append(note) if isinstance(batch, Waiting) else note()

                ticket.add_done_callback(drawn)
                tickets.append(ticket)
            for ticket in tickets:
                ticket.result()
        return [ends[number] for number in range(len(asked))]

    return draw


def ways() -> dict[str, Any]:
    """The ways to draw, by their names. A worker for each of torch's threads, if it has several."""
    found = {"alone": in_turn, "waiting": batched(Waiting), "continuous": batched(Batch)}
    if (threads := torch.get_num_threads()) > 1:
        found[WORKERS] = batched(Batch, threads)
    return found


def speed(rounds: int, count: int, seed: int, least: int = 5, most: int = 50) -> dict[str, Any]:
    """Seconds of each way for the same requests by rounds, all there at once; then the seconds
    until requests of the least steps are drawn that come beside others of the most."""
    pipe = fastdiff.compile(fastdiff.load_demo())
    pipe.set_progress_bar_config(disable=True)
    order, by_name = random.Random(seed), ways()
    warm = [(request, 0.0) for request, _ in requests(pipe, count, seed, least, least)]
    for draw in by_name.values():
        draw(pipe, warm)
    seconds: dict[str, list[float]] = {name: [] for name in by_name}
    for number in range(rounds):
        asked = [(request, 0.0) for request, _ in requests(pipe, count, seed + number, least, most)]
        for name in order.sample(list(by_name), len(by_name)):
            start = time.perf_counter()
            by_name[name](pipe, asked)
            seconds[name].append(time.perf_counter() - start)
    each = median(seconds["alone"]) / count
    short: dict[str, list[float]] = {name: [] for name in by_name if name != "alone"}
    for number in range(rounds):
        mixed = []
        asked = requests(pipe, count, seed + 1000 + number)
        for (request, _), many in zip(asked, itertools.cycle((least, most)), strict=False):
            wait = order.expovariate(1 / (1.25 * each))  # a load of 0.8
            mixed.append((replace(request, num_inference_steps=many), wait))
        for name in order.sample(list(short), len(short)):
            taken = by_name[name](pipe, mixed)
            short[name] += taken[::2]
    return {"seconds": seconds, "short": short, "requests": count}


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("check", "speed"))
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="with check: of the batch")
    parser.add_argument("--minutes", type=float, default=math.inf, help="with check: at most")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any]
    if given.what == "check":
        count = given.requests or 200
        more = {"workers": given.workers, "minutes": given.minutes}
        compared = check(count, given.seed, max(1, CAPACITY // given.workers), **more)
        found = {"requests": count, "compared": compared}
        failed = tell_check(count, compared)
    else:
        found = speed(given.rounds, given.requests or 24, given.seed)
        tell_speed(found)
        failed = False
    if given.json:
        facts = {"command": sys.argv, "threads": torch.get_num_threads()}
        facts |= {"machine": machine(), "versions": versions(), "commit": commit()}
        write_text(given.json, json.dumps(finite(facts | found), indent=1) + "\n")
    return failed


def tell_check(count: int, compared: list[dict[str, Any]]) -> bool:
    """Print what `check` found; whether a picture is outside of its budget, or was left out."""
    wrong = [one for one in compared if one["wrong"]]
    for one in wrong:
        of = f"{one['scheduler']}, {one['steps']} steps, guidance {one['guidance']:.2f}"
        print(f"{of}: {one['wrong']}")
    if len(compared) < count:
        print(f"the minutes are over: {count - len(compared)} of {count} were not compared")
    elif not wrong:
        print("every picture is within its budget")
    return bool(wrong) or len(compared) < count


def tell_speed(found: dict[str, Any]) -> None:
    """Print what `speed` found."""
    seconds, short = found["seconds"], found["short"]
    for name, taken in seconds.items():
        print(f"{name:<10} {found['requests'] / median(taken):6.2f} pictures/s")
    for name in (one for one in ("continuous", WORKERS) if one in seconds):
        for other in ("alone", "waiting"):
            print(f"{name} beside {other}: {speedup(seconds[other], seconds[name])}")
    for name, taken in short.items():
        times = p95(short["waiting"]) / p95(taken)
        print(
            f"5 steps beside 50, {name:<10}: p95 {p95(taken):.2f} s, median {median(taken):.2f} s;"
            f" waiting's p95 is {times:.2f} times as long"
        )


if __name__ == "__main__":
    sys.exit(main())
