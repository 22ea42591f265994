"""Times requests drawn in several ways: one after the other, in batches that wait, continuously."""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

import fastdiff
from benchmarks.batching.requests import CAPACITY, called, requests
from fastdiff.batching import Batch, Request, Ticket
from fastdiff.batching.groups import Group
from fastdiff.batching.worker import Worker
from fastdiff.bench.stats import speedup

WORKERS = "workers"


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
        called(pipe, request, output_type="pil")
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
