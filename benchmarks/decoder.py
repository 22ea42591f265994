"""Times unCLIP's decoder at a scale: `python -m benchmarks.decoder --scale 0.1`.

The calls are UnCLIPImageVariationPipeline's from an embedding, with as little as there can be
beside the decoder: a text encoder of one layer, and two steps of a tiny super-resolution. As
`fastdiff bench` does: eager and fastdiff in random order, a bootstrap interval of the ratio by
rounds, and a speed only beside a receipt: a picture and a step's prediction held to float64.
"""

import argparse
import copy
import os
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UnCLIPImageVariationPipeline, UnCLIPScheduler, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor

import fastdiff
from benchmarks.prior import receipt
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.bench.preset_added import UNCLIP
from fastdiff.bench.preset_parts import Text, clip, clip_tokenizer, made, random
from fastdiff.bench.results import Result, Timed, to_json
from fastdiff.bench.stats import speedup
from fastdiff.bench.timing import GUIDANCE_SCALE, interleave
from fastdiff.compiler.pipelines import loop_of
from fastdiff.kernels.contract import judge
from fastdiff.written import write_text

EMBEDDING = 64
SUPER_RES = {
    "block_out_channels": (32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "in_channels": 6,
    "out_channels": 3,
    "layers_per_block": 1,
    "add_attention": False,
}


def pipeline(scale: float) -> Any:
    cls, config = UNCLIP.network(scale)
    decoder = random(cls, config, torch.float32, "cpu", 0)
    tokenizer = clip_tokenizer()
    encoder = clip(Text(EMBEDDING, 1, "gelu"), tokenizer, projection=True)
    sizes = {
        "clip_embeddings_dim": EMBEDDING,
        "time_embed_dim": 4 * config["block_out_channels"][0],
        "cross_attention_dim": config["cross_attention_dim"],
    }
    small = SUPER_RES | {"sample_size": config["sample_size"]}
    learned = {"variance_type": "learned_range", "clip_sample_range": 1.0}
    pipe = made(
        UnCLIPImageVariationPipeline,
        decoder=decoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_proj=random(UnCLIPTextProjModel, sizes, torch.float32, "cpu", 1),
        feature_extractor=None,
        image_encoder=encoder,  # an embedding is given; its dtype is looked at
        super_res_first=random(UNet2DModel, small, torch.float32, "cpu", 2),
        super_res_last=random(UNet2DModel, small, torch.float32, "cpu", 3),
        decoder_scheduler=made(UnCLIPScheduler, **learned),
        super_res_scheduler=made(UnCLIPScheduler, clip_sample_range=1.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, given: dict[str, Tensor], steps: int) -> tuple[Tensor, float]:
    """The picture, and the milliseconds of the call."""
    start = time.perf_counter()
    picture = pipe(
        **{name: value.to(pipe.decoder.dtype) for name, value in given.items()},
        decoder_num_inference_steps=steps,
        super_res_num_inference_steps=2,
        decoder_guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    ms = 1e3 * (time.perf_counter() - start)
    return torch.from_numpy(picture), ms


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--scale", type=float, default=0.1)
    asked.add_argument("--steps", type=int, default=25)
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--json", type=Path)
    told = asked.parse_args()
    pipe = pipeline(told.scale)
    side = pipe.decoder.config.sample_size
    generator = torch.Generator().manual_seed(0)
    given = {
        "image_embeddings": torch.randn(1, EMBEDDING, generator=generator),
        "decoder_latents": torch.randn(1, 3, side, side, generator=generator),
        "super_res_latents": torch.randn(1, 3, side, side, generator=generator),
    }
    calls: list[dict[str, Any]] = []
    hook = pipe.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    eager, _ = draw(pipe, given, told.steps)
    hook.remove()
    step = calls[len(calls) // 2]
    exact = copy.deepcopy(pipe).to(torch.float64)
    doubled = {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in step.items()
    }
    ours = fastdiff.compile(copy.deepcopy(pipe))
    picture, first = draw(ours, given, told.steps)
    with torch.no_grad():
        nets = [(net, step) for net in (ours.decoder, pipe.decoder)]
        outs = [net(**call).sample for net, call in (*nets, (exact.decoder, doubled))]
    kept = receipt(picture, eager, draw(exact, given, told.steps)[0], judge("step", *outs))
    loop = loop_of(ours)
    if loop is None or loop.planned != 2 or not kept.passed:
        sys.exit(f"no speed without plans and a receipt: {loop}, {kept}")
    runs = {
        name: lambda which=which: draw(which, given, told.steps)[1]
        for name, which in (("eager", pipe), ("fastdiff", ours))
    }
    for run in runs.values():
        run()
    times = interleave(runs, told.rounds, seed=0)
    rows = tuple(
        Timed(
            f"unclip decoder scale {told.scale:g}, fp32, cpu, {side}×{side}, {told.steps} steps",
            name,
            steps_per_s=1e3 * told.steps / median(ms),
            images_per_s=1e3 / median(ms),
            ratio_vs_eager=speedup(times["eager"], ms),
            image_ratio_vs_eager=speedup(times["eager"], ms),
            samples_ms=tuple(one / told.steps for one in ms),
            image_samples_ms=tuple(ms),
            receipt=kept if name == "fastdiff" else None,
            prepare_s=first / 1e3 if name == "fastdiff" else 0.0,
        )
        for name, ms in times.items()
    )
    for row in rows:
        print(f"{row.case}: {row.backend} {row.steps_per_s:.1f} steps/s, {row.ratio_vs_eager}")
    threads = os.environ.get("OMP_NUM_THREADS")
    command = shlex.join(["python", "-m", "benchmarks.decoder", *sys.argv[1:]])
    command = command if threads is None else f"OMP_NUM_THREADS={threads} {command}"
    result = Result(machine(), versions(), commit(), command=command, rows=rows)
    if told.json is not None:
        write_text(told.json, to_json(result))


if __name__ == "__main__":
    main()
