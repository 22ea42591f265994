"""A training loop that can be killed at any moment and resumed with the same result.

Every random draw of a step comes from a generator seeded by that step. A checkpoint is one
safetensors file that is renamed into place, so weights, optimizer and loss curve always agree.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

TICKS = 50  # rows of the loss curve, and checkpoints, per phase

Progress = Callable[[int, float], float]  # (steps done, seconds spent) → share of the phase done


@dataclass(frozen=True)
class Phase:
    """A training phase: `loss` draws its batch from the generator; `lr` is the peak."""

    name: str
    module: nn.Module
    loss: Callable[[torch.Generator], Tensor]
    lr: float


@dataclass(frozen=True)
class Row:
    """One line of the loss curve; `loss` is the mean over the steps since the previous line."""

    step: int
    seconds: float
    loss: float
    lr: float


def minutes(budget: float) -> Progress:
    """Progress of a phase of `budget` minutes, including those before a kill."""
    return lambda step, seconds: seconds / (60 * budget)


def steps(count: int) -> Progress:
    """Progress of a phase of `count` steps."""
    return lambda step, seconds: step / count


def cosine(progress: float) -> float:
    """Share of the peak learning rate: 1 at the start, 0.02 at the end."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(
    phase: Phase,
    progress: Progress,
    folder: Path,
    seed: int = 0,
    watch: Callable[[tuple[Row, ...]], None] = lambda rows: None,
) -> tuple[Row, ...]:
    """Train until `progress` reaches 1, from the checkpoint in `folder` if there is one.

    `TICKS` times it writes a checkpoint and calls `watch` with the loss curve so far.
    Returns the loss curve.
    FloatingPointError as soon as a loss is not finite.
    """
    parameters = list(phase.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=phase.lr, betas=(0.9, 0.99))
    path = folder / f"{phase.name}.safetensors"
    rows = load_checkpoint(path, phase.module, optimizer) if path.exists() else ()
    step, seconds = (rows[-1].step, rows[-1].seconds) if rows else (0, 0.0)
    started = time.perf_counter() - seconds
    losses: list[float] = []
    while (done := progress(step, seconds)) < 1:
        lr = phase.lr * cosine(done)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = phase.loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"{phase.name}: loss is {losses[-1]} at step {step}, expected a finite number; "
                "lower the learning rate or resume with another seed"
            )
        step, seconds = step + 1, time.perf_counter() - started
        if int(TICKS * progress(step, seconds)) > int(TICKS * done):
            rows = (*rows, Row(step, seconds, sum(losses) / len(losses), lr))
            losses = []
            save_checkpoint(path, phase.module, optimizer, rows)
            watch(rows)
    return rows


def save_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, rows: tuple[Row, ...]
) -> None:
    """Weights and optimizer state as tensors, the loss curve as JSON in the file's header."""
    tensors = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"rows": json.dumps([asdict(row) for row in rows])})
    os.replace(unfinished, path)


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Row, ...]:
    """Load a checkpoint into `module` and `optimizer`; returns the loss curve so far.

    Raises RuntimeError if it was written for another network.
    """
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
            kind, name = key.split(".", 1)
            if kind == "model":
                weights[name] = file.get_tensor(key)
            else:
                index, entry = name.split(".")
                state.setdefault(int(index), {})[entry] = file.get_tensor(key)
        rows = json.loads(file.metadata()["rows"])
    module.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return tuple(Row(**row) for row in rows)
