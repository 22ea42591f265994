"""Two pipelines, one of them compiled, to which the same is done; do they draw the same?"""

import copy
import functools
import random
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from small import TINY, noisy
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel

import fastdiff
from fastdiff.errors import UserError

VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "sample_size": 16,
    "force_upcast": False,
}
TEXT = {
    "vocab_size": 8,
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
LEAST = {
    torch.float64: 80.0,
    torch.float32: 80.0,
    torch.float16: 50.0,
    torch.bfloat16: 35.0,
}
"""Decibels between two pictures that are the same but for rounding, by the U-Net's dtype."""

_OURS = str(Path(fastdiff.__file__).parent)


@functools.cache
def original() -> Any:
    """A tiny eager pipeline, float32, that is told its prompt as embeddings; to be copied."""
    torch.manual_seed(3)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",  # the last of two steps counts, too
    )
    pipe = StableDiffusionPipeline(
        noisy(AutoencoderKL(**VAE)),
        CLIPTextModel(CLIPTextConfig(**TEXT)).eval(),
        None,
        noisy(UNet2DConditionModel(**TINY)),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Twin:
    """A pipeline and how its user calls it."""

    pipe: Any
    fast: bool
    """Whether this is the one to be compiled."""
    dice: random.Random = field(default_factory=random.Random)
    """Falls alike for both twins."""
    call: dict[str, Any] = field(default_factory=dict)
    """Further arguments of its pictures."""
    around: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)
    """What its pictures are drawn in, such as autocast."""
    entry: Callable[..., Any] = field(default=lambda pipe, **given: pipe(**given))
    """How it is called."""
    exact: bool = False
    """Whether its pictures are to be the eager ones bit for bit, since all was restored."""
    seen: list[Any] = field(default_factory=list)
    """Tensors and numbers that the user's own functions saw: alike but for rounding."""
    saved: list[dict[str, Tensor]] = field(default_factory=list)
    """What was read back from files: alike in every bit."""

    def compile(self, *options: Any) -> None:
        """Compile the fast twin; a sentence that refuses leaves it as it was."""
        if self.fast:
            try:
                fastdiff.compile(self.pipe, *options)
            except UserError:
                return
            self.exact = False

    def restore(self) -> None:
        if self.fast:
            fastdiff.restore(self.pipe)
            self.exact = True


@torch.no_grad()
def draw(twin: Twin) -> list[Tensor]:
    """The picture, and what the autoencoder encodes of another."""
    torch.manual_seed(11)
    pipe, dtype = twin.pipe, twin.pipe.unet.dtype

    def noise(*shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    given = {
        "prompt_embeds": noise(1, 7, 24, seed=1),
        "negative_prompt_embeds": noise(1, 7, 24, seed=2),
        "latents": noise(1, 4, 8, 8, seed=3),
        "generator": torch.Generator().manual_seed(5),
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "pt",
    }
    with ExitStack() as stack:
        for around in twin.around:
            stack.enter_context(around())
        picture = twin.entry(pipe, **given | twin.call).images
        encoded = pipe.vae.encode(noise(1, 3, 16, 16, seed=4).to(pipe.vae.dtype)).latent_dist.mean
    return [torch.as_tensor(picture), encoded]


def psnr(got: Tensor, want: Tensor) -> float:
    """Decibels, a range of one; infinite where each bit is the same."""
    if torch.equal(got, want):
        return float("inf")
    if not want.isfinite().all():
        return float("inf")  # fastdiff does better than float16 that overflows
    return float(-10 * torch.log10((got.double() - want.double()).square().mean()))


@dataclass(frozen=True)
class Fate:
    """What became of an attempt."""

    value: Any = None
    error: Exception | None = None


def attempt(run: Callable[[], Any]) -> Fate:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Fate(run())
    except Exception as error:
        return Fate(error=error)


def told(error: Exception | None) -> str:
    """One line: class, where it was raised, first line."""
    if error is None:
        return "nothing is raised"
    last = traceback.extract_tb(error.__traceback__)[-1]
    words = (str(error).splitlines() or [""])[0][:150]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {words}"


def ours(error: Exception) -> bool:
    """Whether it was raised by fastdiff's code, and is none of its sentences."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return last.startswith(_OURS) and not isinstance(error, UserError)


def fault(eager: Fate, fast: Fate, least: float) -> str | None:
    """What is wrong with what the compiled twin did, next to what the eager one did."""
    if eager.error is None and fast.error is None:
        return differences(fast.value, eager.value, least)
    if fast.error is None:
        return f"silent where eager raises {told(eager.error)}"
    if eager.error is None:
        return f"uncaught: {told(fast.error)}"
    return f"a traceback: {told(fast.error)}" if ours(fast.error) else None


def differences(got: Any, want: Any, least: float) -> str | None:
    """Where two structures of tensors and plain values differ, tensors by less than `least` dB."""
    got, want = tree_leaves(got), tree_leaves(want)
    if len(got) != len(want):
        return f"wrong: {len(got)} values instead of {len(want)}"
    for ours, theirs in zip(got, want, strict=True):
        if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
            if ours != theirs:
                return f"wrong: {ours!r} instead of {theirs!r}"[:300]
        elif (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return f"wrong: {ours.shape} {ours.dtype} instead of {theirs.shape} {theirs.dtype}"
        elif not (decibels := psnr(ours, theirs)) >= least:
            return f"wrong: {decibels:.1f} dB, {least:.0f} wanted"
    return None


def twins() -> tuple[Twin, Twin]:
    """An eager one, and one to be compiled."""
    return Twin(copy.deepcopy(original()), False), Twin(copy.deepcopy(original()), True)
