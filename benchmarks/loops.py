"""Times one denoising loop that `fastdiff bench` does not draw: `python -m benchmarks.loops prior`.

As `fastdiff bench` does: eager and fastdiff in random order, a bootstrap interval of the ratio by
rounds, and a speed only beside a receipt: the result of a call, and the network's prediction in its
middle step, held to float64. Beside the loop a call does as little as it can: text encoders are not
counted, and what comes after the loop is tiny.
"""

import argparse
import copy
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    UnCLIPImageVariationPipeline,
    UnCLIPScheduler,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor

import fastdiff
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.bench.pixels import noise_as
from fastdiff.bench.preset_added import UNCLIP
from fastdiff.bench.preset_dit import DIT_256, PIXART_SIGMA
from fastdiff.bench.preset_flux import FLUX
from fastdiff.bench.preset_parts import Text, clip, clip_tokenizer, made, random
from fastdiff.bench.preset_prior import PRIOR, prior_alone
from fastdiff.bench.receipt import PICTURE_FACTOR, PICTURE_FLOOR, Receipt
from fastdiff.bench.results import Result, Timed, to_json
from fastdiff.bench.stats import speedup
from fastdiff.bench.timing import GUIDANCE_SCALE, interleave
from fastdiff.compiler.pipelines import loop_of
from fastdiff.kernels.contract import judge
from fastdiff.written import write_text

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
EMBEDDING, TOKENS = 64, 60
SUPER_RES = {
    "block_out_channels": (32, 32),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "in_channels": 6,
    "out_channels": 3,
    "layers_per_block": 1,
    "add_attention": False,
}


@dataclass(frozen=True)
class Loop:
    """A pipeline whose call is little more than one loop."""

    make: Callable[[float, torch.dtype], Any]
    """(scale, dtype) -> the pipeline, with random weights."""
    network: str
    """The component that the loop repeats."""
    call: Callable[[Any, int], Any]
    """(pipeline, steps) -> the result of a call with guidance, from the same noise each time."""
    plans: int = 1
    """The loops of a call."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_prior(scale: float, dtype: torch.dtype) -> Any:
    return prior_alone(PRIOR, scale, dtype, "cpu", seed=0)


def call_prior(pipe: Any, steps: int) -> Any:
    return pipe(
        "red heart",
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
        latents=noise(1, pipe.prior.config.embedding_dim).to(pipe.prior.dtype),
    ).image_embeds


def make_decoder(scale: float, dtype: torch.dtype) -> Any:
    cls, config = UNCLIP.network(scale)
    tokenizer = clip_tokenizer()
    encoder = clip(Text(EMBEDDING, 1, "gelu"), tokenizer, projection=True).to(dtype)
    sizes = {
        "clip_embeddings_dim": EMBEDDING,
        "time_embed_dim": 4 * config["block_out_channels"][0],
        "cross_attention_dim": config["cross_attention_dim"],
    }
    small = SUPER_RES | {"sample_size": config["sample_size"]}
    learned = {"variance_type": "learned_range", "clip_sample_range": 1.0}
    return made(
        UnCLIPImageVariationPipeline,
        decoder=random(cls, config, dtype, "cpu", 0),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_proj=random(UnCLIPTextProjModel, sizes, dtype, "cpu", 1),
        feature_extractor=None,
        image_encoder=encoder,  # an embedding is given; its dtype is looked at
        super_res_first=random(UNet2DModel, small, dtype, "cpu", 2),
        super_res_last=random(UNet2DModel, small, dtype, "cpu", 3),
        decoder_scheduler=made(UnCLIPScheduler, **learned),
        super_res_scheduler=made(UnCLIPScheduler, clip_sample_range=1.0),
    )


def call_decoder(pipe: Any, steps: int) -> Any:
    side, dtype = pipe.decoder.config.sample_size, pipe.decoder.dtype
    return pipe(
        image_embeddings=noise(1, EMBEDDING).to(dtype),
        decoder_latents=noise(1, 3, side, side, seed=1).to(dtype),
        super_res_latents=noise(1, 3, side, side, seed=2).to(dtype),
        decoder_num_inference_steps=steps,
        super_res_num_inference_steps=2,
        decoder_guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def vae(dtype: torch.dtype) -> Any:
    """An autoencoder whose pixels are latents."""
    config = {"block_out_channels": (32,), "norm_num_groups": 8, "layers_per_block": 1}
    return random(AutoencoderKL, config, dtype, "cpu", 1)


def make_dit(scale: float, dtype: torch.dtype) -> Any:
    cls, config = DIT_256.network(scale)
    transformer = random(cls, config, dtype, "cpu", 0)
    transformer.pos_embed.pos_embed.copy_(cls(**config | {"num_layers": 1}).pos_embed.pos_embed)
    scheduler = made(DDIMScheduler, clip_sample=False)
    return made(DiTPipeline, transformer=transformer, vae=vae(dtype), scheduler=scheduler)


def call_dit(pipe: Any, steps: int) -> Any:
    return pipe(
        [207],
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def make_pixart(scale: float, dtype: torch.dtype) -> Any:
    cls, config = PIXART_SIGMA.network(scale)
    transformer = random(cls, config, dtype, "cpu", 0)
    transformer.pos_embed.pos_embed.copy_(cls(**config | {"num_layers": 1}).pos_embed.pos_embed)
    return made(
        PixArtSigmaPipeline,
        tokenizer=None,
        text_encoder=None,
        vae=vae(dtype),
        transformer=transformer,
        scheduler=made(DPMSolverMultistepScheduler),
    )


def call_pixart(pipe: Any, steps: int) -> Any:
    dtype, config = pipe.transformer.dtype, pipe.transformer.config
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    texts = [noise(1, TOKENS, config.caption_channels, seed=seed).to(dtype) for seed in (1, 2)]
    return pipe(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=texts[0],
        prompt_attention_mask=mask,
        negative_prompt_embeds=texts[1],
        negative_prompt_attention_mask=mask,
        height=config.sample_size,
        width=config.sample_size,
        use_resolution_binning=False,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        latents=noise(1, 4, config.sample_size, config.sample_size).to(dtype),
        output_type="latent",
    ).images


def make_flux(scale: float, dtype: torch.dtype) -> Any:
    cls, config = FLUX.network(scale)
    return made(
        FluxPipeline,
        scheduler=made(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
        vae=vae(dtype),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
        transformer=random(cls, config, dtype, "cpu", 0),
    )


def call_flux(pipe: Any, steps: int) -> Any:
    """Its guidance is distilled; the latents are those of a tenth of its width."""
    dtype, config, side = pipe.transformer.dtype, pipe.transformer.config, FLUX.side(0.1)
    return pipe(
        prompt_embeds=noise(1, TOKENS, config.joint_attention_dim, seed=1).to(dtype),
        pooled_prompt_embeds=noise(1, config.pooled_projection_dim, seed=2).to(dtype),
        height=side,
        width=side,
        num_inference_steps=steps,
        latents=noise(1, side**2 // 4, config.in_channels).to(dtype),
        output_type="latent",
    ).images


LOOPS = {
    "prior": Loop(make_prior, "prior", call_prior),
    "unclip-decoder": Loop(make_decoder, "decoder", call_decoder, plans=2),
    "dit": Loop(make_dit, "transformer", call_dit),
    "pixart": Loop(make_pixart, "transformer", call_pixart),
    "flux": Loop(make_flux, "transformer", call_flux),
}


def draw(loop: Loop, pipe: Any, steps: int) -> tuple[Tensor, float]:
    """The result of a call, float64, and the milliseconds after its text encoder."""
    marks, hooks = [time.perf_counter()], []
    if getattr(pipe, "text_encoder", None) is not None:
        mark = lambda *_: marks.append(time.perf_counter())  # noqa: E731
        hooks.append(pipe.text_encoder.register_forward_hook(mark))
    result = torch.as_tensor(loop.call(pipe, steps)).double()
    ms = 1e3 * (time.perf_counter() - marks[-1])
    for hook in hooks:
        hook.remove()
    return result, ms


def step_of(loop: Loop, pipe: Any, steps: int) -> tuple[Any, Any]:
    """The arguments and keywords of the network's middle call."""
    calls: list[tuple[Any, Any]] = []
    network = getattr(pipe, loop.network)
    hook = network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    draw(loop, pipe, steps)
    hook.remove()
    return calls[len(calls) // 2]


def in_double(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floats else value


def receipt(
    results: tuple[Tensor, Tensor, Tensor], predictions: tuple[Tensor, Tensor, Tensor]
) -> Receipt:
    """Whether a call's result and a step's prediction are inside the error budget; of each ours,
    eager's and float64's."""
    (result, eager, exact), (own, theirs, truth) = results, predictions
    verdict = judge("step", own, theirs, truth)

    def rms(x: Tensor) -> float:
        return float((x - exact).square().mean().sqrt())

    allowed = max(PICTURE_FACTOR * rms(eager), PICTURE_FLOOR)
    return Receipt(
        psnr_db=math.nan,
        ssim=math.nan,
        max_abs=float((result - eager).abs().max()),
        err_vs_fp64=float((own - truth).abs().max()),
        err_eager_vs_fp64=float((theirs - truth).abs().max()),
        budget=verdict.allowed,
        picture_rms_vs_fp64=rms(result),
        picture_rms_eager_vs_fp64=rms(eager),
        passed=bool(verdict.passed) and rms(result) <= allowed,
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("loop", choices=LOOPS)
    asked.add_argument("--scale", type=float, default=0.1)
    asked.add_argument("--dtype", choices=KINDS, default="fp32")
    asked.add_argument("--steps", type=int, default=10)
    asked.add_argument("--rounds", type=int, default=9)
    asked.add_argument("--json", type=Path)
    told = asked.parse_args()
    loop, steps = LOOPS[told.loop], told.steps
    pipe = loop.make(told.scale, KINDS[told.dtype])
    pipe.set_progress_bar_config(disable=True)

    args, kwargs = step_of(loop, pipe, steps)
    exact_pipe = copy.deepcopy(pipe).to(torch.float64)
    with noise_as(exact_pipe, KINDS[told.dtype]):
        exact, _ = draw(loop, exact_pipe, steps)
    doubled = {name: in_double(value) for name, value in kwargs.items()}
    with torch.no_grad():
        network = getattr(exact_pipe, loop.network)
        truth = network(*map(in_double, args), **doubled | {"return_dict": False})[0]
    del exact_pipe, network
    ours = fastdiff.compile(copy.deepcopy(pipe))
    eager, _ = draw(loop, pipe, steps)
    result, first = draw(loop, ours, steps)
    with torch.no_grad():
        outs = [
            getattr(which, loop.network)(*args, **kwargs | {"return_dict": False})[0]
            for which in (ours, pipe)
        ]
    kept = receipt((result, eager, exact), (*outs, truth))
    found = loop_of(ours)
    if found is None or found.planned != loop.plans or not kept.passed:
        sys.exit(f"no speed without plans and a receipt: {found}, {kept}")

    runs = {
        name: lambda which=which: draw(loop, which, steps)[1]
        for name, which in (("eager", pipe), ("fastdiff", ours))
    }
    for run in runs.values():
        run()
    times = interleave(runs, told.rounds, seed=0)
    rows = tuple(
        Timed(
            f"{told.loop} scale {told.scale:g}, {told.dtype}, cpu, {steps} steps",
            name,
            steps_per_s=1e3 * steps / median(ms),
            images_per_s=1e3 / median(ms),
            ratio_vs_eager=speedup(times["eager"], ms),
            image_ratio_vs_eager=speedup(times["eager"], ms),
            samples_ms=tuple(one / steps for one in ms),
            image_samples_ms=tuple(ms),
            receipt=kept if name == "fastdiff" else None,
            prepare_s=first / 1e3 if name == "fastdiff" else 0.0,
        )
        for name, ms in times.items()
    )
    for row in rows:
        print(f"{row.case}: {row.backend} {row.steps_per_s:.1f} steps/s, {row.ratio_vs_eager}")
    threads = os.environ.get("OMP_NUM_THREADS")
    command = shlex.join(["python", "-m", "benchmarks.loops", *sys.argv[1:]])
    command = command if threads is None else f"OMP_NUM_THREADS={threads} {command}"
    document = Result(machine(), versions(), commit(), command=command, rows=rows)
    if told.json is not None:
        write_text(told.json, to_json(document))


if __name__ == "__main__":
    main()
