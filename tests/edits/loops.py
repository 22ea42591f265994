"""Edits by callbacks between steps, of the call's arguments, and calls of fastdiff itself."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

import fastdiff
from edits.calls import Own
from edits.table import Edit, add, altered, edit
from edits.twins import Twin

# Callbacks: called as (twin, pipe, step, latents); returned latents replace the pipeline's


def called_back(change: Callable[[Twin, Any, int, Tensor], Any]) -> Callable[[Twin], None]:
    def apply(twin: Twin) -> None:
        def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> Any:
            returned = change(twin, pipe, step, given["latents"])
            return {"latents": returned} if isinstance(returned, Tensor) else {}

        twin.call["callback_on_step_end"] = callback

    return apply


def preview(twin: Twin, pipe: Any, step: int, latents: Tensor) -> None:
    outputs = getattr(pipe.scheduler, "model_outputs", None)
    twin.seen.append((step, latents.clone(), pipe.guidance_scale, outputs and outputs[-1]))


def decoded(twin: Twin, pipe: Any, step: int, latents: Tensor) -> None:
    twin.seen.append(pipe.vae.decode(latents).sample)


def predicted(twin: Twin, pipe: Any, step: int, latents: Tensor) -> None:
    text = torch.ones(1, 7, 24, dtype=latents.dtype)
    twin.seen.append(pipe.unet(latents, 7, text).sample)


def in_place(twin: Twin, pipe: Any, step: int, latents: Tensor) -> None:
    latents.mul_(0.9)


@torch.no_grad()
def weight(twin: Twin, pipe: Any, step: int, latents: Tensor) -> None:
    pipe.unet.conv_out.weight.mul_(1.1)


def larger(twin: Twin, pipe: Any, step: int, latents: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(latents, scale_factor=2) if step == 0 else latents


def hooked(twin: Twin, pipe: Any, step: int, latents: Tensor) -> None:
    if step == 0:
        pipe.unet.mid_block.register_forward_hook(lambda module, args, out: altered(out))


CALLBACKS: dict[str, Callable[[Twin, Any, int, Tensor], Any]] = {
    "previews": preview,
    "decodes": decoded,
    "predicts": predicted,
    "darkens": lambda twin, pipe, step, latents: latents * 0.9,
    "darkens in place": in_place,
    "changes guidance": lambda twin, pipe, step, latents: setattr(pipe, "_guidance_scale", 2.0),
    "turns guidance off": lambda twin, pipe, step, latents: setattr(pipe, "_guidance_scale", 1.0),
    "turns guidance off in the last step": lambda twin, pipe, step, latents: setattr(
        pipe, "_guidance_scale", 2.0 - step
    ),
    "rescales": lambda twin, pipe, step, latents: setattr(pipe, "_guidance_rescale", 0.5),
    "interrupts": lambda twin, pipe, step, latents: setattr(pipe, "_interrupt", True),
    "sets FreeU": lambda twin, pipe, step, latents: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "sets a processor": lambda twin, pipe, step, latents: pipe.unet.set_attn_processor(Own()),
    "changes a weight": weight,
    "changes an attribute": lambda twin, pipe, step, latents: setattr(
        pipe.unet.conv_norm_out, "eps", 0.5
    ),
    "enlarges": larger,
    "hooks": hooked,
    "changes the scheduler": lambda twin, pipe, step, latents: setattr(
        pipe.scheduler, "final_alpha_cumprod", torch.tensor(0.9)
    ),
}
for _name, _change in CALLBACKS.items():
    add(Edit("callback", _name, called_back(_change)))


@edit("callback", "requests the prompt")
def asks(twin: Twin) -> None:
    twin.call["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    twin.call["callback_on_step_end"] = lambda pipe, i, t, given: {
        "prompt_embeds": given["prompt_embeds"] * 0.9
    }


@edit("callback", "diffusers' own")
def cutoff(twin: Twin) -> None:
    twin.call["callback_on_step_end"] = SDCFGCutoffCallback(0.5)


@edit("callback", "none")
def none(twin: Twin) -> None:
    twin.call.pop("callback_on_step_end", None)
    twin.call.pop("callback_on_step_end_tensor_inputs", None)


for _name, _options in {
    "a call rescaled": {"guidance_rescale": 0.5},
    "a call without guidance": {"guidance_scale": 1.0},
    "a call of three steps": {"num_inference_steps": 3},
    "a call with eta": {"eta": 0.7},
    "a call for two pictures": {"num_images_per_prompt": 2, "latents": None},
}.items():
    add(Edit("callback", _name, lambda twin, options=_options: twin.call.update(options)))


# fastdiff itself


def again(twin: Twin) -> None:
    twin.restore()
    twin.compile()


def parts(run: Callable[[Any], Any]) -> Callable[[Twin], None]:
    def apply(twin: Twin) -> None:
        if twin.fast:
            run(twin.pipe)

    return apply


def another_pipeline(twin: Twin) -> None:
    """Another pipeline of the same components, as from_pipe makes it."""
    twin.pipe = type(twin.pipe)(**twin.pipe.components, requires_safety_checker=False)
    twin.pipe.set_progress_bar_config(disable=True)


def another_vae(twin: Twin) -> None:
    torch.manual_seed(21)
    twin.pipe.vae = AutoencoderKL.from_config(twin.pipe.vae.config).eval().to(twin.pipe.dtype)


for _name, _apply in {
    "restored": Twin.restore,
    "restored twice": lambda twin: (twin.restore(), twin.restore()),
    "restored and compiled": again,
    "compiled": Twin.compile,
    "compiled without the VAE": lambda twin: (
        twin.restore(),
        twin.compile(fastdiff.Options(ignore=("vae",))),
    ),
    "the U-Net restored": parts(lambda pipe: fastdiff.restore(pipe.unet)),
    "the U-Net compiled": parts(lambda pipe: fastdiff.compile(pipe.unet)),
    "the VAE restored": parts(lambda pipe: fastdiff.restore(pipe.vae)),
    "reported": parts(lambda pipe: str(fastdiff.report(pipe))),
    "another pipeline of the components": another_pipeline,
    "another VAE": another_vae,
}.items():
    add(Edit("restore", _name, _apply))
