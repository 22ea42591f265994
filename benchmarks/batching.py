"""Requests that share a recorded step beside requests drawn otherwise, on the demo.

    python -m benchmarks.batching check --requests 200
    python -m benchmarks.batching speed --rounds 7 --json batching.json

`check` draws random requests (5 to 50 steps, guidance, scheduler, arrival) in a batch and holds the
latents of each to float64, within the error budget of the same request drawn alone. `speed` times,
in random order, one picture after the other, batches that wait for their slowest picture, and a
batch that is joined and left between steps.
"""

import argparse
import copy
import itertools
import json
import os
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
from fastdiff.batching import Batch, Request, Ticket
from fastdiff.batching.groups import Group
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
CAPACITY = 4


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


def check(count: int, seed: int, capacity: int, least: int = 5, most: int = 50) -> list[str]:
    """Draw random requests in a batch; returns a sentence for each that is outside of its budget.

    The budget is the house's, with the same request drawn alone in place of eager: the error
    against float64 may be twice that of the picture drawn alone, plus one rounding.
    """
    pipe = fastdiff.compile(fastdiff.load_demo())
    exact = fastdiff.load_demo().to(torch.float64)
    for one in (pipe, exact):
        one.set_progress_bar_config(disable=True)
    drawn: list[tuple[Request, Ticket, list[Any]]] = []
    with Batch(pipe, capacity) as batch:
        for request, wait in requests(pipe, count, seed, least, most, unguided=0.3):
            time.sleep(wait)
            last: list[Any] = []

            def keep(step: int, steps: int, latents: Any, last: list[Any] = last) -> None:
                last[:] = [latents] if step == steps else []

            drawn.append((request, batch.submit(replace(request, on_step=keep)), last))
        for _, ticket, _ in drawn:
            ticket.result()
        stats = batch.stats()
    wrong = []
    for request, ticket, (latents,) in drawn:
        alone = called(pipe, request)
        with noise_as(exact, torch.float32):
            true = called(exact, request)
        verdict = judge("latents", latents, alone, true)
        what = f"{type(request.scheduler).__name__}, {request.num_inference_steps} steps"
        if ticket.alone:
            wrong.append(f"{what}: drawn alone: {ticket.alone}")
        if not verdict.passed:
            told = f"error {verdict.error:.2e}, allowed {verdict.allowed:.2e}"
            wrong.append(f"{what}, guidance {request.guidance_scale:.2f}: {told}")
    print(f"{count} requests in {stats.steps} steps, {stats.filled / stats.steps:.2f} at a time")
    return wrong


class Kept(Group):
    """Pictures that keep their places until the last of them is done."""

    most = 0

    def _count(self, device: torch.device) -> int:
        self.most = max(self.most, len(self.drawings))
        return self.most


class Waiting(Batch):
    """Takes requests only when all those before are done, and hands none over before."""

    group = Kept

    def __init__(self, pipe: Any, capacity: int) -> None:
        self.notes: list[Callable[[], None]] = []
        """To be called when all are done."""
        super().__init__(pipe, capacity)

    def _admit(self) -> bool:
        if not self._drawings:
            for note in self.notes:
                note()
            self.notes.clear()
        return super()._admit()

    def _room(self, begun: int) -> bool:
        if begun == 0:
            self._empty = not self._drawings
        return self._empty and begun < self.capacity


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


def batched(kind: type[Batch]) -> Callable[[Any, list[tuple[Request, float]]], list[float]]:
    def draw(pipe: Any, asked: list[tuple[Request, float]]) -> list[float]:
        ends: dict[int, float] = {}
        with kind(pipe, CAPACITY) as batch:
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


WAYS = {"alone": in_turn, "waiting": batched(Waiting), "continuous": batched(Batch)}


def speed(rounds: int, count: int, seed: int, least: int = 5, most: int = 50) -> dict[str, Any]:
    """Seconds of each way for the same requests by rounds, all there at once; then the seconds
    until requests of the least steps are drawn that come beside others of the most."""
    pipe = fastdiff.compile(fastdiff.load_demo())
    pipe.set_progress_bar_config(disable=True)
    order = random.Random(seed)
    warm = [(request, 0.0) for request, _ in requests(pipe, count, seed, least, least)]
    for draw in WAYS.values():
        draw(pipe, warm)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds):
        asked = [(request, 0.0) for request, _ in requests(pipe, count, seed + number, least, most)]
        for name in order.sample(list(WAYS), len(WAYS)):
            start = time.perf_counter()
            WAYS[name](pipe, asked)
            seconds[name].append(time.perf_counter() - start)
    each = median(seconds["alone"]) / count
    short: dict[str, list[float]] = {name: [] for name in ("waiting", "continuous")}
    for number in range(rounds):
        mixed = []
        asked = requests(pipe, count, seed + 1000 + number)
        for (request, _), many in zip(asked, itertools.cycle((least, most)), strict=False):
            wait = order.expovariate(1 / (1.25 * each))  # a load of 0.8
            mixed.append((replace(request, num_inference_steps=many), wait))
        for name in order.sample(list(short), 2):
            taken = WAYS[name](pipe, mixed)
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
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.what == "check":
        wrong = check(given.requests or 200, given.seed, CAPACITY)
        print(*wrong, "every picture is within its budget" if not wrong else "", sep="\n")
        return bool(wrong)
    found = speed(given.rounds, given.requests or 24, given.seed)
    seconds, short = found["seconds"], found["short"]
    for name, taken in seconds.items():
        print(f"{name:<10} {found['requests'] / median(taken):6.2f} pictures/s")
    for name in ("alone", "waiting"):
        print(f"continuous beside {name}: {speedup(seconds[name], seconds['continuous'])}")
    for name, taken in short.items():
        print(
            f"5 steps beside 50, {name:<10}: p95 {p95(taken):.2f} s, median {median(taken):.2f} s"
        )
    print(f"p95 {p95(short['waiting']) / p95(short['continuous']):.2f} times lower")
    if given.json:
        facts = {"command": sys.argv, "threads": os.environ.get("OMP_NUM_THREADS")}
        facts |= {"machine": machine(), "versions": versions(), "commit": commit()}
        write_text(given.json, json.dumps(finite(facts | found), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
