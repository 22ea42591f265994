"""Holds what a batch draws to float64, within the error of the same requests drawn by themselves.

The yardstick of a picture is the largest error against float64 of three drawings of it without a
batch: by the compiled pipeline alone, which is what a batch promises, and by eager diffusers in
each of its two memory formats, which is the rule of a receipt (`fastdiff.bench.receipt`). All take
the same steps in the same dtype. One alone is a poor yardstick: a loop amplifies rounding, some a
thousandfold, so how far a drawing is from float64 is drawn by lot. Held to the compiled pipeline's
only, some of a batch's pictures are outside, and as many the other way round.

The largest of three is more than a typical one, so a loss of accuracy in every picture, each within
its budget, would pass. The geometric mean of error(batch) / error(alone) over all requests would
show it, and is told with its interval. Nothing is decided by it: sums of another length are of
another order, and no rule of the house says how much a mean may move by that.
"""

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastdiff
from benchmarks.batching.parting import parting
from benchmarks.batching.requests import called, requests
from benchmarks.clock import Budget
from fastdiff.batching import Batch, Request, Ticket
from fastdiff.bench.pixels import noise_as
from fastdiff.bench.stats import mean_ratio
from fastdiff.kernels.contract import Verdict, judge
from fastdiff.recipes import denoiser

BATCH, ALONE, EXACT = "batch", "alone", "float64"
EAGER = ("contiguous", "channels_last")


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
    """Draw random requests in a batch; returns what was found of each that was compared within the
    minutes: the errors against float64 by who drew (eager only where that decides), what is
    `wrong`, if anything, and whether the picture drawn alone is within the batch's budget (`turned`
    round).

    The budget is the house's, with the yardstick in place of eager: the error against float64 may
    be twice that of the yardstick plus one rounding.
    """
    budget = Budget(minutes)
    pipes = ways()
    drawn = in_batch(pipes[ALONE], count, seed, capacity, least, most, workers)
    found = []
    for request, ticket, steps in drawn:
        if not budget.left_s > 0:
            break
        found.append(_compared(pipes, request, ticket, steps))
    return found


def ways() -> dict[str, Any]:
    """The demo as it draws without a batch: compiled, in eager's memory formats, and in float64."""
    pipes = {ALONE: fastdiff.compile(fastdiff.load_demo())}
    pipes |= {name: fastdiff.load_demo() for name in (*EAGER, EXACT)}
    denoiser(pipes["channels_last"]).to(memory_format=torch.channels_last)
    pipes[EXACT].to(torch.float64)
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def in_batch(
    pipe: Any, count: int, seed: int, capacity: int, least: int, most: int, workers: int = 1
) -> list[tuple[Request, Ticket, list[Tensor]]]:
    """Draw random requests, each with the latents after each of its steps, [1, C, Y, X]."""
    drawn: list[tuple[Request, Ticket, list[Tensor]]] = []
    with Batch(pipe, capacity, workers) as batch:
        for request, wait in requests(pipe, count, seed, least, most, unguided=0.3):
            time.sleep(wait)
            steps: list[Tensor] = []

            def keep(_: int, __: int, latents: Tensor, steps: list[Tensor] = steps) -> None:
                steps.append(latents)

            drawn.append((request, batch.submit(replace(request, on_step=keep)), steps))
        for _, ticket, _ in drawn:
            ticket.result()
        stats = batch.stats()
    print(f"{count} requests in {stats.steps} steps, {stats.filled / stats.steps:.2f} at a time")
    return drawn


def _compared(
    pipes: dict[str, Any], request: Request, ticket: Ticket, steps: list[Tensor]
) -> dict[str, Any]:
    """What was found of one request."""
    exact = pipes[EXACT]
    exact.scheduler = request.scheduler  # whose noise is to be float32's, too
    with noise_as(exact, torch.float32):
        true = called(exact, request)
    got, alone = steps[-1], called(pipes[ALONE], request)
    verdicts: dict[str, Verdict] = {}
    for name in (ALONE, *EAGER):
        one = alone if name == ALONE else called(pipes[name], request)
        verdicts[name] = judge("latents", got, one, true)
        if verdicts[name].passed:  # and so by the largest of the errors, too
            break
    verdict = max(verdicts.values(), key=lambda one: one.allowed)
    errors = {name: one.eager_error for name, one in verdicts.items()} | {BATCH: verdict.error}
    told = {"scheduler": type(request.scheduler).__name__, "guidance": request.guidance_scale}
    told |= {"steps": request.num_inference_steps, "seed": request.seed}
    told |= {"errors": errors, "allowed": verdict.allowed, "wrong": None}
    told["turned"] = judge("latents", alone, got, true).passed
    if ticket.alone:
        told["wrong"] = f"drawn alone: {ticket.alone}"
    elif not verdict.passed:
        told["wrong"] = f"error {verdict.error:.2e}, allowed {verdict.allowed:.2e}"
        found = parting(pipes[ALONE], exact, request, steps)
        if found is not None:
            told |= {"parting": vars(found), "parts": str(found)}
    return told


def tell_check(count: int, compared: list[dict[str, Any]]) -> bool:
    """Print what `check` found; whether a picture is outside of its budget, or was left out."""
    wrong = [one for one in compared if one["wrong"]]
    for one in wrong:
        of = f"{one['scheduler']}, {one['steps']} steps, guidance {one['guidance']:.2f}"
        print(f"{of}: {one['wrong']}")
        if "parts" in one:
            print(f"  {one['parts']}")
    if len(compared) > 1:
        errors = [one["errors"] for one in compared]
        mean = mean_ratio([one[BATCH] for one in errors], [one[ALONE] for one in errors])
        print(f"error(batch) / error(alone): {mean.median:.2f} [{mean.lo:.2f}, {mean.hi:.2f}]")
        alone = sum(len(one) > 2 for one in errors)
        turned = sum(not one["turned"] for one in compared)
        print(f"held to the picture drawn alone only, {alone} would be outside; that one, held to")
        print(f"the batch's, in {turned} cases")
    if len(compared) < count:
        print(f"the minutes are over: {count - len(compared)} of {count} were not compared")
    elif not wrong:
        print("every picture is within its budget")
    return bool(wrong) or len(compared) < count
