"""The pipelines that fastdiff knows: a row for each class, and nothing about any of them elsewhere.

What is compiled, planned, measured, exported and documented is read from here. A new pipeline of
networks that fastdiff computes is a new row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastdiff.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Where a denoising loop finds what its plan is made from.

    The loop is one whose step is nothing but the network, guidance and the scheduler. `latents` and
    `timesteps` have these names in all of them.
    """

    conditions: Mapping[str, str]
    """What the network is told: fields of its family's conditions, and the local variables of the
    pipeline's `__call__` that they are."""
    required: tuple[str, ...]
    """Those of the variables that a diffusers which the plan can follow has."""
    returned: tuple[str, ...]
    """Those that a callback may return beside the latents."""
    attention_kwargs: str = ""
    """The pipeline's property that the network is given as an argument of the same name; the scale
    of LoRA adapters stands there; "": there is none."""
    pictures: str = ""
    """The condition that IP-Adapters read; what they add depends on their scales, too. Where it is
    no variable, it stands in the attention kwargs. "": there is none."""
    step_options: str = ""
    """The variable that holds further arguments of the scheduler's `step`; "": there are none."""
    entrance: str = "interrupt"
    """Where the plan enters the loop: "interrupt", which it asks the pipeline for at the top of
    every step, or "progress_bar", which it opens around all of them."""
    results: tuple[str, ...] = ()
    """Variables beside `latents` that the last step leaves its sample in."""
    schedulers: tuple[str, ...] = ()
    """Classes of those whose last step does so; (): any."""
    absent: tuple[str, ...] = ()
    """Variables that must be None: what they ask for is no part of a plan."""

    @property
    def replaced(self) -> dict[str, str]:
        """The fields of the conditions that what a callback returns replaces, by its name."""
        return {name: field for field, name in self.conditions.items() if name in self.returned}


_TEXT = {
    "encoder_hidden_states": "prompt_embeds",
    "timestep_cond": "timestep_cond",
    "image_embeds": "image_embeds",
}
_ADDED = {"text_embeds": "add_text_embeds", "time_ids": "add_time_ids"}
SD_PLAN = Plan(
    _TEXT,
    ("prompt_embeds", "timestep_cond"),
    ("prompt_embeds",),
    attention_kwargs="cross_attention_kwargs",
    pictures="image_embeds",
    step_options="extra_step_kwargs",
)
XL_PLAN = replace(
    SD_PLAN,
    conditions=_TEXT | _ADDED,
    returned=("prompt_embeds", "add_text_embeds", "add_time_ids"),
)
LCM_PLAN = replace(
    SD_PLAN,
    conditions=_TEXT | {"timestep_cond": "w_embedding"},
    required=("prompt_embeds", "w_embedding"),
    entrance="progress_bar",
    results=("denoised",),
    schedulers=("LCMScheduler",),
)
SD3_PLAN = Plan(
    conditions={
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    },
    required=("prompt_embeds", "pooled_prompt_embeds"),
    returned=("prompt_embeds", "pooled_prompt_embeds"),
    attention_kwargs="joint_attention_kwargs",
    pictures="ip_adapter_image_embeds",
    absent=("skip_guidance_layers",),
)
SD3_PICTURE_PLAN = replace(SD3_PLAN, returned=("prompt_embeds",))
UNET: Mapping[str, str] = {"unet": "unet", "vae": "vae"}
MMDIT: Mapping[str, str] = {"transformer": "mmdit", "vae": "vae"}


@dataclass(frozen=True)
class Recipe:
    """A pipeline class."""

    networks: Mapping[str, str] = field(default_factory=lambda: UNET)
    """Components that fastdiff computes, and their families; the loop repeats the first."""
    plan: Plan | None = None
    """None: the loop stays diffusers', with our networks in it."""
    from_text: str = ""
    """The class that draws from a text alone with the same components, itself perhaps; "": none."""
    upcasts: bool = False
    """Whether it decodes in float32 beside a float16 U-Net where the autoencoder's config says
    `force_upcast`; other pipelines do not look at that."""
    exported: bool = False
    """Whether its networks can be exported, and its blocks priced."""
    loop: str = "a few numbers per step"
    """What the loop is where it is diffusers', as the report says it."""

    @property
    def denoiser(self) -> str:
        """The component that the loop repeats."""
        return next(iter(self.networks))


def _rows() -> dict[str, Recipe]:
    controlled = {"unet": "unet", "controlnet": "controlnet", "vae": "vae"}
    joint = {"transformer": "mmdit", "controlnet": "mmdit_control", "vae": "vae"}
    blocks = "its blocks run one by one in every step, which no plan follows"
    sd, xl = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
    lcm, sd3 = "LatentConsistencyModelPipeline", "StableDiffusion3Pipeline"
    return {
        sd: Recipe(plan=SD_PLAN, from_text=sd, exported=True),
        "StableDiffusionImg2ImgPipeline": Recipe(plan=SD_PLAN, from_text=sd),
        "StableDiffusionInpaintPipeline": Recipe(from_text=sd),
        "StableDiffusionInstructPix2PixPipeline": Recipe(),
        "StableDiffusionControlNetPipeline": Recipe(controlled),
        "StableDiffusionControlNetImg2ImgPipeline": Recipe(controlled),
        "StableDiffusionControlNetInpaintPipeline": Recipe(controlled),
        "StableDiffusionAdapterPipeline": Recipe(),
        xl: Recipe(plan=XL_PLAN, from_text=xl, upcasts=True, exported=True),
        "StableDiffusionXLImg2ImgPipeline": Recipe(plan=XL_PLAN, from_text=xl, upcasts=True),
        "StableDiffusionXLInpaintPipeline": Recipe(from_text=xl, upcasts=True),
        "StableDiffusionXLInstructPix2PixPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetImg2ImgPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetInpaintPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetUnionPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetUnionImg2ImgPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetUnionInpaintPipeline": Recipe(upcasts=True),
        "StableDiffusionXLAdapterPipeline": Recipe(upcasts=True),
        lcm: Recipe(plan=LCM_PLAN, from_text=lcm),
        "LatentConsistencyModelImg2ImgPipeline": Recipe(plan=LCM_PLAN, from_text=lcm),
        sd3: Recipe(MMDIT, plan=SD3_PLAN, from_text=sd3, exported=True),
        "StableDiffusion3Img2ImgPipeline": Recipe(MMDIT, plan=SD3_PICTURE_PLAN, from_text=sd3),
        "StableDiffusion3InpaintPipeline": Recipe(MMDIT, from_text=sd3),
        "StableDiffusion3ControlNetPipeline": Recipe(joint),
        "StableDiffusion3ControlNetInpaintingPipeline": Recipe(joint),
        # with blocks of a user's own around a U-Net, diffusers makes the bare ModularPipeline
        "ModularPipeline": Recipe(controlled, loop=blocks),
        "StableDiffusionXLModularPipeline": Recipe(controlled, upcasts=True, loop=blocks),
        "StableDiffusion3ModularPipeline": Recipe(MMDIT, loop=blocks),
    }


RECIPES: Mapping[str, Recipe] = _rows()
"""By the name of the class; one outside of diffusers has its path: "package.module.Class"."""


def recipe_of(pipe: Any) -> Recipe | None:
    """The row of a pipeline's class; None where fastdiff does not know it."""
    return recipe_of_class(type(pipe))


def recipe_of_class(cls: type) -> Recipe | None:
    """As `recipe_of`."""
    return RECIPES.get(_path(cls)) or RECIPES.get(cls.__name__)


def packages_of(pipe: Any) -> tuple[str, ...]:
    """The package of a pipeline whose row has its path: its loop is as good as diffusers'."""
    path = _path(type(pipe))
    return (path.partition(".")[0],) if path in RECIPES else ()


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def denoiser(pipe: Any) -> Any:
    """The network that a pipeline's loop repeats."""
    recipe = recipe_of(pipe)
    return getattr(pipe, "unet" if recipe is None else recipe.denoiser)


def exported(pipe: Any, what: str) -> Recipe:
    """The row of a pipeline whose networks can be exported. UserError for any other: `what` it is
    that cannot be done with it."""
    recipe = recipe_of(pipe)
    if recipe is None or not recipe.exported:
        supported = ", ".join(name for name, one in RECIPES.items() if one.exported)
        raise UserError(f"{what}; supported are {supported}")
    return recipe


def decodes_in_float32(pipe: Any) -> bool:
    """Whether diffusers turns the pipeline's float16 autoencoder into float32 to draw with it."""
    recipe, vae = recipe_of(pipe), getattr(pipe, "vae", None)
    config = getattr(vae, "config", None)
    return recipe is not None and recipe.upcasts and bool(getattr(config, "force_upcast", False))
