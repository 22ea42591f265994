"""Times UnCLIP's prior, which draws no picture: `python -m benchmarks.prior --scale 0.25`.

As `fastdiff bench` does: eager and fastdiff in random order, a bootstrap interval of the ratio by
rounds, and a speed only beside a receipt: an embedding and a step's prediction held to float64.
"""

import argparse
import copy
import math
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from diffusers.schedulers import scheduling_unclip
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import fastdiff
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.bench.preset_prior import PRIOR, prior_alone
from fastdiff.bench.receipt import PICTURE_FACTOR, PICTURE_FLOOR, Receipt
from fastdiff.bench.results import Result, Timed, to_json
from fastdiff.bench.stats import speedup
from fastdiff.bench.timing import GUIDANCE_SCALE, interleave
from fastdiff.compiler.pipelines import loop_of
from fastdiff.kernels.contract import judge
from fastdiff.written import write_text

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def draw(pipe: Any, latents: Tensor, steps: int) -> tuple[Tensor, float, float]:
    """The embedding, the milliseconds of the call, and those after the text encoder."""
    marks: list[float] = []
    hook = pipe.text_encoder.register_forward_hook(lambda *_: marks.append(time.perf_counter()))
    start = time.perf_counter()
    made = pipe(
        "red heart",
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
        latents=latents.to(pipe.prior.dtype),
    ).image_embeds
    end = time.perf_counter()
    hook.remove()
    return made, 1e3 * (end - start), 1e3 * (end - marks[-1])


def step_of(pipe: Any, latents: Tensor, steps: int) -> dict[str, Any]:
    """The arguments of the middle call of the prior."""
    calls: list[dict[str, Any]] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({"hidden_states": args[0]} | kwargs)

    hook = pipe.prior.register_forward_pre_hook(keep, with_kwargs=True)
    draw(pipe, latents, steps)
    hook.remove()
    return calls[len(calls) // 2]


def single(*shape: Any, dtype: torch.dtype, **more: Any) -> Tensor:
    """Noise as float32 draws it, so that float64 draws the same."""
    return randn_tensor(*shape, dtype=torch.float32, **more).to(dtype)


def receipt(
    embeddings: tuple[Tensor, Tensor, Tensor], steps: tuple[Tensor, Tensor, Tensor]
) -> Receipt:
    """Whether an embedding and a step's prediction are inside the error budget; of each ours,
    eager's and float64's."""
    made, eager, exact = embeddings
    verdict = judge("step", *steps)

    def rms(x: Tensor) -> float:
        return float((x.double() - exact).square().mean().sqrt())

    allowed = max(PICTURE_FACTOR * rms(eager), PICTURE_FLOOR)
    return Receipt(
        psnr_db=math.nan,
        ssim=math.nan,
        max_abs=float((made - eager).abs().max()),
        err_vs_fp64=float((steps[0] - steps[2]).abs().max()),
        err_eager_vs_fp64=float((steps[1] - steps[2]).abs().max()),
        budget=verdict.allowed,
        picture_rms_vs_fp64=rms(made),
        picture_rms_eager_vs_fp64=rms(eager),
        passed=bool(verdict.passed) and rms(made) <= allowed,
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--scale", type=float, default=0.25)
    asked.add_argument("--dtype", choices=KINDS, default="fp32")
    asked.add_argument("--steps", type=int, default=25)
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--json", type=Path)
    told = asked.parse_args()
    pipe = prior_alone(PRIOR, told.scale, KINDS[told.dtype], "cpu", seed=0)
    pipe.set_progress_bar_config(disable=True)
    wide = pipe.prior.config.embedding_dim
    latents = torch.randn(1, wide, generator=torch.Generator().manual_seed(0))

    given = step_of(pipe, latents, told.steps)
    exact_pipe = copy.deepcopy(pipe).to(torch.float64)
    with patch.object(scheduling_unclip, "randn_tensor", single):
        exact = draw(exact_pipe, latents, told.steps)[0]
    doubled = {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in given.items()
    }
    with torch.no_grad():
        truth = exact_pipe.prior(**doubled)[0]
    del exact_pipe
    ours = fastdiff.compile(copy.deepcopy(pipe))
    eager = draw(pipe, latents, told.steps)[0]
    start = time.perf_counter()
    made = draw(ours, latents, told.steps)[0]
    first = time.perf_counter() - start
    with torch.no_grad():
        predicted = ours.prior(**given)[0], pipe.prior(**given)[0], truth
    kept = receipt((made, eager, exact), predicted)
    loop = loop_of(ours)
    if loop is None or loop.planned != 1 or not kept.passed:
        sys.exit(f"no speed without a plan and a receipt: {loop}, {kept}")

    runs = {
        name: lambda which=which: draw(which, latents, told.steps)[1:]
        for name, which in (("eager", pipe), ("fastdiff", ours))
    }
    for run in runs.values():
        run()
    times = interleave(runs, told.rounds, seed=0)
    whole, step = (
        {name: [t[at] / per for t in times[name]] for name in runs}
        for at, per in ((0, 1), (1, told.steps))
    )
    case = f"prior scale {told.scale:g}, {told.dtype}, cpu, {told.steps} steps"
    rows = tuple(
        Timed(
            case,
            name,
            steps_per_s=1e3 / median(step[name]),
            images_per_s=1e3 / median(whole[name]),
            ratio_vs_eager=speedup(step["eager"], step[name]),
            image_ratio_vs_eager=speedup(whole["eager"], whole[name]),
            samples_ms=tuple(step[name]),
            image_samples_ms=tuple(whole[name]),
            receipt=kept if name == "fastdiff" else None,
            prepare_s=first if name == "fastdiff" else 0.0,
        )
        for name in runs
    )
    for row in rows:
        print(f"{row.case}: {row.backend} {row.steps_per_s:.1f} steps/s, {row.ratio_vs_eager}")
    command = shlex.join(["python", "-m", "benchmarks.prior", *sys.argv[1:]])
    result = Result(machine(), versions(), commit(), command=command, rows=rows)
    if told.json is not None:
        write_text(told.json, to_json(result))


if __name__ == "__main__":
    main()
