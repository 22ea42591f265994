"""The pipelines that fastdiff knows: one row for each class.

Compile, plan, bench, export and the docs read this table; no other file names a pipeline class. To
add a pipeline whose networks fastdiff computes, add a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastdiff import prior_plans
from fastdiff.errors import UserError
from fastdiff.plans import Plan

_TEXT = {
    "encoder_hidden_states": "prompt_embeds",
    "timestep_cond": "timestep_cond",
    "image_embeds": "image_embeds",
}
_PERTURBED = {"image_embeds": "ip_adapter_image_embeds"}
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
PAG_PLAN = replace(SD_PLAN, conditions=_TEXT | _PERTURBED)
XL_PAG_PLAN = replace(XL_PLAN, conditions=_TEXT | _ADDED | _PERTURBED)
SD_INPAINT_PLAN, XL_INPAINT_PLAN, PAG_INPAINT_PLAN, XL_PAG_INPAINT_PLAN = (
    replace(plan, noises="add_noise", constant_channels=("mask", "masked_image_latents"))
    for plan in (SD_PLAN, XL_PLAN, PAG_PLAN, XL_PAG_PLAN)
)
LCM_PLAN = replace(
    SD_PLAN,
    conditions=_TEXT | {"timestep_cond": "w_embedding"},
    required=("prompt_embeds", "w_embedding"),
    entrance="progress_bar",
    results=("denoised",),
    schedulers=("LCMScheduler",),
    scaled="",
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
    skips={
        "encoder_hidden_states": "original_prompt_embeds",
        "pooled_projections": "original_pooled_prompt_embeds",
    },
    scaled="",
)
SD3_PICTURE_PLAN = replace(SD3_PLAN, returned=("prompt_embeds",), skips={})
SD3_INPAINT_PLAN = replace(SD3_PICTURE_PLAN, noises="scale_noise")
SD3_PAG_PLAN = replace(SD3_PICTURE_PLAN, pictures="")
DDPM_PLAN = Plan(
    conditions={},
    required=(),
    returned=(),
    step_arguments=("generator",),
    latents="image",
    entrance="progress_bar",
    iterates=True,
    scaled="",
)
DDIM_PLAN = replace(DDPM_PLAN, step_arguments=("eta", "use_clipped_model_output", "generator"))
UPSCALE_PLAN = Plan(
    conditions={"encoder_hidden_states": "prompt_embeds", "class_labels": "noise_level"},
    required=("prompt_embeds", "noise_level"),
    returned=(),
    attention_kwargs="cross_attention_kwargs",
    step_options="extra_step_kwargs",
    entrance="progress_bar",
    settings={
        "guidance_scale": "guidance_scale",
        "do_classifier_free_guidance": "do_classifier_free_guidance",
        "cross_attention_kwargs": "cross_attention_kwargs",
    },
    repeated=("class_labels",),
    constant_channels=("image",),
)
LDM_PLAN = Plan(
    conditions={"encoder_hidden_states": "prompt_embeds"},
    required=("prompt_embeds",),
    returned=(),
    step_options="extra_kwargs",
    entrance="progress_bar",
    iterates=True,
    settings={"guidance_scale": "guidance_scale"},
    unconditional={"encoder_hidden_states": "negative_prompt_embeds"},
    scaled="",
)
LDM_PICTURE_PLAN = Plan(
    conditions={},
    required=(),
    returned=(),
    step_options="extra_kwargs",
    entrance="progress_bar",
    iterates=True,
    timesteps="timesteps_tensor",
    constant_channels=("image",),
    scaled="input",
)
UNET: Mapping[str, str] = {"unet": "unet", "vae": "vae"}
UNET2D: Mapping[str, str] = {"unet": "unet2d"}
MMDIT: Mapping[str, str] = {"transformer": "mmdit", "vae": "vae"}


@dataclass(frozen=True)
class Recipe:
    """What fastdiff knows about a pipeline class."""

    networks: Mapping[str, str] = field(default_factory=lambda: UNET)
    """Components that fastdiff computes, and their families; the loop repeats the first."""
    plan: Plan | tuple[Plan, ...] = ()
    """That of its loop, or those of its loops. (): diffusers runs the loop, with our networks in
    it."""
    from_text: str = ""
    """The class, perhaps this one, that draws from text alone with the same components. "" if
    none."""
    upcasts: bool = False
    """Whether it decodes in float32 beside a float16 U-Net if the autoencoder's config sets
    `force_upcast`; other pipelines ignore that setting."""
    exported: bool = False
    """Whether its networks can be exported, and the least time of its blocks computed."""
    loop: str = "a few numbers per step"
    """What the report says of the loop if diffusers runs it."""
    community: str = ""
    """The `custom_pipeline` by which diffusers loads the class. "" for a class of diffusers."""

    @property
    def denoiser(self) -> str:
        """The component that the loop repeats."""
        return next(iter(self.networks))

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One for each loop that can run as a plan, its network named."""
        plans = self.plan if isinstance(self.plan, tuple) else (self.plan,)
        return tuple(replace(plan, network=plan.network or self.denoiser) for plan in plans)


def _rows() -> dict[str, Recipe]:
    controlled = {"unet": "unet", "controlnet": "controlnet", "vae": "vae"}
    joint = {"transformer": "mmdit", "controlnet": "mmdit_control", "vae": "vae"}
    enlarged = {"super_res_first": "unet2d", "super_res_last": "unet2d"}
    prior, pixels = {"prior": "prior"}, {"decoder": "unet"} | enlarged
    blocks = "its blocks run one by one in every step, which no plan follows"
    sd, xl = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
    lcm, sd3 = "LatentConsistencyModelPipeline", "StableDiffusion3Pipeline"
    return {
        sd: Recipe(plan=SD_PLAN, from_text=sd, exported=True),
        "StableDiffusionImg2ImgPipeline": Recipe(plan=SD_PLAN, from_text=sd),
        "StableDiffusionInpaintPipeline": Recipe(plan=SD_INPAINT_PLAN, from_text=sd),
        "StableDiffusionInstructPix2PixPipeline": Recipe(),
        "StableDiffusionControlNetPipeline": Recipe(controlled),
        "StableDiffusionControlNetImg2ImgPipeline": Recipe(controlled),
        "StableDiffusionControlNetInpaintPipeline": Recipe(controlled),
        "StableDiffusionAdapterPipeline": Recipe(),
        "StableDiffusionPAGPipeline": Recipe(plan=PAG_PLAN, from_text=sd),
        "StableDiffusionPAGImg2ImgPipeline": Recipe(plan=PAG_PLAN, from_text=sd),
        "StableDiffusionPAGInpaintPipeline": Recipe(plan=PAG_INPAINT_PLAN, from_text=sd),
        "StableDiffusionControlNetPAGPipeline": Recipe(controlled),
        "StableDiffusionControlNetPAGInpaintPipeline": Recipe(controlled),
        xl: Recipe(plan=XL_PLAN, from_text=xl, upcasts=True, exported=True),
        "StableDiffusionXLImg2ImgPipeline": Recipe(plan=XL_PLAN, from_text=xl, upcasts=True),
        "StableDiffusionXLInpaintPipeline": Recipe(
            plan=XL_INPAINT_PLAN, from_text=xl, upcasts=True
        ),
        "StableDiffusionXLInstructPix2PixPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetImg2ImgPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetInpaintPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetUnionPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetUnionImg2ImgPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetUnionInpaintPipeline": Recipe(upcasts=True),
        "StableDiffusionXLAdapterPipeline": Recipe(upcasts=True),
        "StableDiffusionXLPAGPipeline": Recipe(plan=XL_PAG_PLAN, from_text=xl, upcasts=True),
        "StableDiffusionXLPAGImg2ImgPipeline": Recipe(plan=XL_PAG_PLAN, from_text=xl, upcasts=True),
        "StableDiffusionXLPAGInpaintPipeline": Recipe(
            plan=XL_PAG_INPAINT_PLAN, from_text=xl, upcasts=True
        ),
        "StableDiffusionXLControlNetPAGPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetPAGImg2ImgPipeline": Recipe(controlled, upcasts=True),
        lcm: Recipe(plan=LCM_PLAN, from_text=lcm),
        "LatentConsistencyModelImg2ImgPipeline": Recipe(plan=LCM_PLAN, from_text=lcm),
        sd3: Recipe(MMDIT, plan=SD3_PLAN, from_text=sd3, exported=True),
        "StableDiffusion3Img2ImgPipeline": Recipe(MMDIT, plan=SD3_PICTURE_PLAN, from_text=sd3),
        "StableDiffusion3InpaintPipeline": Recipe(MMDIT, plan=SD3_INPAINT_PLAN, from_text=sd3),
        "StableDiffusion3PAGPipeline": Recipe(MMDIT, plan=SD3_PAG_PLAN, from_text=sd3),
        "StableDiffusion3PAGImg2ImgPipeline": Recipe(MMDIT, plan=SD3_PAG_PLAN, from_text=sd3),
        "StableDiffusion3ControlNetPipeline": Recipe(joint),
        "StableDiffusion3ControlNetInpaintingPipeline": Recipe(joint),
        "StableDiffusionUpscalePipeline": Recipe(plan=UPSCALE_PLAN, upcasts=True),
        "LDMTextToImagePipeline": Recipe({"unet": "unet", "vqvae": "vae"}, plan=LDM_PLAN),
        "LDMSuperResolutionPipeline": Recipe(
            {"unet": "unet2d", "vqvae": "vae"}, plan=LDM_PICTURE_PLAN
        ),
        "DDPMPipeline": Recipe(UNET2D, plan=DDPM_PLAN, exported=True),
        "DDIMPipeline": Recipe(UNET2D, plan=DDIM_PLAN, exported=True),
        "UnCLIPPipeline": Recipe(prior | pixels, plan=prior_plans.UNCLIP),
        "UnCLIPImageVariationPipeline": Recipe(pixels, plan=prior_plans.VARIATION),
        "StableUnCLIPPipeline": Recipe({"unet": "unet", **prior, **UNET}, plan=prior_plans.STABLE),
        "StableUnCLIPImg2ImgPipeline": Recipe(plan=prior_plans.STABLE_PICTURE),
        "KandinskyV22PriorPipeline": Recipe(prior, plan=prior_plans.KANDINSKY),
        "KandinskyV22PriorEmb2EmbPipeline": Recipe(prior, plan=prior_plans.KANDINSKY_EMB2EMB),
        "CLIPGuidedStableDiffusion": Recipe(
            community="clip_guided_stable_diffusion",
            loop="a few numbers per step, and CLIP's gradients if they are asked for",
        ),
        # with blocks of a user's own around a U-Net, diffusers makes the bare ModularPipeline
        "ModularPipeline": Recipe(controlled, loop=blocks),
        "StableDiffusionXLModularPipeline": Recipe(controlled, upcasts=True, loop=blocks),
        "StableDiffusion3ModularPipeline": Recipe(MMDIT, loop=blocks),
    }


RECIPES: Mapping[str, Recipe] = _rows()
"""By class name, or for a class outside of diffusers by its path, "package.module.Class"."""


def recipe_of(pipe: Any) -> Recipe | None:
    """The row of a pipeline's class; None if fastdiff does not know it."""
    return recipe_of_class(type(pipe))


def recipe_of_class(cls: type) -> Recipe | None:
    """The row of a pipeline class; None if fastdiff does not know it."""
    return RECIPES.get(_path(cls)) or RECIPES.get(cls.__name__)


def packages_of(pipe: Any) -> tuple[str, ...]:
    """The package of a pipeline that is registered by path; its code is trusted as diffusers'
    is."""
    path = _path(type(pipe))
    return (path.partition(".")[0],) if path in RECIPES else ()


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def denoiser(pipe: Any) -> Any:
    """The network that a pipeline's loop repeats."""
    recipe = recipe_of(pipe)
    return getattr(pipe, "unet" if recipe is None else recipe.denoiser)


def autoencoder(pipe: Any) -> Any:
    """The autoencoder of a pipeline, or None."""
    recipe = recipe_of(pipe) or Recipe()
    names = [name for name, family in recipe.networks.items() if family == "vae"]
    return getattr(pipe, names[0], None) if names else None


def exported(pipe: Any, what: str) -> Recipe:
    """The row of a pipeline whose networks can be exported. For any other, UserError; `what` begins
    its message."""
    recipe = recipe_of(pipe)
    if recipe is None or not recipe.exported:
        supported = ", ".join(name for name, one in RECIPES.items() if one.exported)
        raise UserError(f"{what}; supported are {supported}")
    return recipe


def decodes_in_float32(pipe: Any) -> bool:
    """Whether diffusers casts the pipeline's float16 autoencoder to float32 before it decodes."""
    recipe, vae = recipe_of(pipe), autoencoder(pipe)
    config = getattr(vae, "config", None)
    return recipe is not None and recipe.upcasts and bool(getattr(config, "force_upcast", False))
