"""Where a picture of a batch parts from the one drawn alone, and what the loop makes of that."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.batching.requests import called
from fastdiff.batching import Batch, Request
from fastdiff.bench.pixels import noise_as
from fastdiff.kernels.contract import max_error


@dataclass(frozen=True)
class Parting:
    """Two drawings of a request; distances are the largest of the latents.

    If float64's loop makes of the first distance about the last one, then the loop amplifies what
    rounding does; an error of a step's own adds to it, whatever the loop does.
    """

    step: int
    """The first step, from 1, after which they differ."""
    steps: int
    distances: list[float]
    """After each step from that one on."""
    exact: float
    """What float64's loop makes of the first of them until its end."""

    def __str__(self) -> str:
        return (
            f"parts from the one drawn alone at step {self.step} of {self.steps} by"
            f" {self.distances[0]:.1e}, ends {self.distances[-1]:.1e} apart; float64 makes"
            f" {self.exact:.1e} of the former"
        )


def parting(pipe: Any, exact: Any, request: Request, steps: list[Tensor]) -> Parting | None:
    """Compare a drawing's latents after each of its `steps` with those of the request drawn alone;
    None if they are the same.

    Args:
        pipe: the compiled pipeline, which no batch has.
        exact: the same in float64, its scheduler the request's.
    """
    alone: list[Tensor] = []
    with Batch(pipe, capacity=1) as batch:
        batch.submit(replace(request, on_step=lambda *told: alone.append(told[2]))).result()
    pairs = zip(steps, alone, strict=True)
    first = next((i for i, (one, other) in enumerate(pairs) if not torch.equal(one, other)), None)
    if first is None:
        return None
    apart = steps[first].double() - alone[first].double()

    def nudged(step: int, latents: Tensor) -> Tensor:
        return latents + apart if step == first else latents

    with noise_as(exact, torch.float32):
        ends = [called(exact, request, after) for after in (None, nudged)]
    return Parting(
        step=first + 1,
        steps=len(steps),
        distances=[max_error(*both) for both in zip(steps[first:], alone[first:], strict=True)],
        exact=max_error(*ends),
    )
