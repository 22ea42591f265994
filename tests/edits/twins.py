"""Two equal pipelines, one of them compiled, that must draw the same after the same edits."""

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
"""Minimum PSNR in dB between pictures that differ only by rounding, by the U-Net's dtype."""

_OURS = str(Path(fastdiff.__file__).parent)


@functools.cache
def original() -> Any:
    """A tiny eager float32 pipeline without tokenizer, which takes prompt embeddings; copy it."""
    torch.manual_seed(3)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",  # so that the last of two steps matters
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
    """Seeded alike for both twins."""
    call: dict[str, Any] = field(default_factory=dict)
    """Further arguments of its calls."""
    around: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)
    """Contexts in which its pictures are drawn, such as autocast."""
    entry: Callable[..., Any] = field(default=lambda pipe, **given: pipe(**given))
    """The function that calls the pipeline."""
    exact: bool = False
    """Whether its pictures must equal the eager ones bit for bit, because it was restored."""
    seen: list[Any] = field(default_factory=list)
    """Tensors and numbers that the user's functions received; they must agree up to rounding."""
    saved: list[dict[str, Tensor]] = field(default_factory=list)
    """Weights read back from files; they must agree bit for bit."""

    def compile(self, *options: Any) -> None:
        """Compile the fast twin; if fastdiff refuses, it stays as it was."""
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
    """The picture, and the latents that the VAE encodes from another picture."""
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
    """PSNR in dB for values in [0, 1]; infinite if all values are equal or `want` is not finite."""
    if torch.equal(got, want):
        return float("inf")
    if not want.isfinite().all():
        return float("inf")  # eager float16 overflowed; fastdiff may be finite
    return float(-10 * torch.log10((got.double() - want.double()).square().mean()))


@dataclass(frozen=True)
class Fate:
    """The outcome of an attempt: a value or an exception."""

    value: Any = None
    error: Exception | None = None


def attempt(run: Callable[[], Any]) -> Fate:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Fate(run())
    except Exception as error:
        return Fate(error=error)


def summary(error: Exception | None) -> str:
    """One line: the exception's class, where it was raised, the first line of its message."""
    if error is None:
        return "nothing is raised"
    last = traceback.extract_tb(error.__traceback__)[-1]
    words = (str(error).splitlines() or [""])[0][:150]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {words}"


def ours(error: Exception) -> bool:
    """Whether fastdiff's code raised it and it is not a UserError."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return last.startswith(_OURS) and not isinstance(error, UserError)


def fault(eager: Fate, fast: Fate, least: float) -> str | None:
    """What is wrong with the compiled twin's outcome, given the eager twin's; None if nothing."""
    if eager.error is None and fast.error is None:
        return differences(fast.value, eager.value, least)
    if fast.error is None:
        return f"silent where eager raises {summary(eager.error)}"
    if eager.error is None:
        return f"uncaught: {summary(fast.error)}"
    return f"a traceback: {summary(fast.error)}" if ours(fast.error) else None


def differences(got: Any, want: Any, least: float) -> str | None:
    """The first difference of two structures; their tensors must agree to `least` dB."""
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
            return f"wrong: {decibels:.1f} dB, at least {least:.0f} expected"
    return None


def twins() -> tuple[Twin, Twin]:
    """An eager twin, and one to be compiled."""
    return Twin(copy.deepcopy(original()), False), Twin(copy.deepcopy(original()), True)
