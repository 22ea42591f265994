"""The pipelines that fastdiff knows: one row for each class.

Compile, plan, bench, export and the docs read this table; no other file names a pipeline class. To
add a pipeline whose networks fastdiff computes, add a row.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastdiff.errors import UserError
from fastdiff.plans import Plan, deepfloyd, priors, transformers, unets

UNET: Mapping[str, str] = {"unet": "unet", "vae": "vae"}
UNET2D: Mapping[str, str] = {"unet": "unet2d"}
MOVQ: Mapping[str, str] = {"unet": "unet", "movq": "vae"}
PIXART: Mapping[str, str] = {"transformer": "pixart", "vae": "vae"}
MMDIT: Mapping[str, str] = {"transformer": "mmdit", "vae": "vae"}
FLUX: Mapping[str, str] = {"transformer": "flux", "vae": "vae"}
FLUX2: Mapping[str, str] = {"transformer": "flux2", "vae": "vae"}
PICTURES = {"image", "control_image"}
"""Arguments of calls that begin with a picture."""
PIXELS = 1024
"""Height and width of the pictures of a pipeline that tells no size of its own."""


@dataclass(frozen=True)
class Recipe:
    """What fastdiff knows about a pipeline class."""

    networks: Mapping[str, str] = field(default_factory=lambda: UNET)
    """Components that fastdiff computes, and their families; the loop repeats the first."""
    plan: Plan | tuple[Plan, ...] = ()
    """That of its loop, or those of its loops. (): diffusers runs the loop, with our networks in
    it."""
    from_text: str = ""
    """The class that draws without a picture with the same components; this one, if its call can do
    without. "": this one, or none if its call takes a picture."""
    upcasts: bool = False
    """Whether it decodes in float32 beside a float16 U-Net if the autoencoder's config sets
    `force_upcast`; other pipelines ignore that setting."""
    exported: bool = False
    """Whether its networks can be exported and, unless its call needs a picture, the least time of
    its blocks computed."""
    loop: str = "a few numbers per step"
    """The report's text for a loop that diffusers runs."""
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
    flowing = {"transformer": "flux", "controlnet": "flux_control", "vae": "vae"}
    enlarged = {"super_res_first": "unet2d", "super_res_last": "unet2d"}
    prior, pixels = {"prior": "prior"}, {"decoder": "unet"} | enlarged
    blocks = "its blocks run one by one in every step, which no plan follows"
    sd, xl = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
    lcm, sd3 = "LatentConsistencyModelPipeline", "StableDiffusion3Pipeline"
    flux, kontext = "FluxPipeline", "FluxKontextPipeline"
    second, klein = "Flux2Pipeline", "Flux2KleinPipeline"
    return {
        sd: Recipe(plan=unets.SD, exported=True),
        "StableDiffusionImg2ImgPipeline": Recipe(plan=unets.SD, from_text=sd),
        "StableDiffusionInpaintPipeline": Recipe(plan=unets.SD_INPAINT, from_text=sd),
        "StableDiffusionInstructPix2PixPipeline": Recipe(),
        "StableDiffusionControlNetPipeline": Recipe(controlled),
        "StableDiffusionControlNetImg2ImgPipeline": Recipe(controlled),
        "StableDiffusionControlNetInpaintPipeline": Recipe(controlled),
        "StableDiffusionAdapterPipeline": Recipe(),
        "StableDiffusionPAGPipeline": Recipe(plan=unets.PAG, from_text=sd),
        "StableDiffusionPAGImg2ImgPipeline": Recipe(plan=unets.PAG, from_text=sd),
        "StableDiffusionPAGInpaintPipeline": Recipe(plan=unets.PAG_INPAINT, from_text=sd),
        "StableDiffusionControlNetPAGPipeline": Recipe(controlled),
        "StableDiffusionControlNetPAGInpaintPipeline": Recipe(controlled),
        xl: Recipe(plan=unets.XL, upcasts=True, exported=True),
        "StableDiffusionXLImg2ImgPipeline": Recipe(plan=unets.XL, from_text=xl, upcasts=True),
        "StableDiffusionXLInpaintPipeline": Recipe(
            plan=unets.XL_INPAINT, from_text=xl, upcasts=True
        ),
        "StableDiffusionXLInstructPix2PixPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetImg2ImgPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetInpaintPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetUnionPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetUnionImg2ImgPipeline": Recipe(upcasts=True),
        "StableDiffusionXLControlNetUnionInpaintPipeline": Recipe(upcasts=True),
        "StableDiffusionXLAdapterPipeline": Recipe(upcasts=True),
        "StableDiffusionXLPAGPipeline": Recipe(plan=unets.XL_PAG, from_text=xl, upcasts=True),
        "StableDiffusionXLPAGImg2ImgPipeline": Recipe(
            plan=unets.XL_PAG, from_text=xl, upcasts=True
        ),
        "StableDiffusionXLPAGInpaintPipeline": Recipe(
            plan=unets.XL_PAG_INPAINT, from_text=xl, upcasts=True
        ),
        "StableDiffusionXLControlNetPAGPipeline": Recipe(controlled, upcasts=True),
        "StableDiffusionXLControlNetPAGImg2ImgPipeline": Recipe(controlled, upcasts=True),
        lcm: Recipe(plan=unets.LCM),
        "LatentConsistencyModelImg2ImgPipeline": Recipe(plan=unets.LCM, from_text=lcm),
        sd3: Recipe(MMDIT, plan=transformers.SD3, exported=True),
        "StableDiffusion3Img2ImgPipeline": Recipe(
            MMDIT, plan=transformers.SD3_PICTURE, from_text=sd3
        ),
        "StableDiffusion3InpaintPipeline": Recipe(
            MMDIT, plan=transformers.SD3_INPAINT, from_text=sd3
        ),
        "StableDiffusion3PAGPipeline": Recipe(MMDIT, plan=transformers.SD3_PICTURE, from_text=sd3),
        "StableDiffusion3PAGImg2ImgPipeline": Recipe(
            MMDIT, plan=transformers.SD3_PICTURE, from_text=sd3
        ),
        "StableDiffusion3ControlNetPipeline": Recipe(joint),
        "PixArtAlphaPipeline": Recipe(PIXART, plan=transformers.PIXART_ALPHA, exported=True),
        "PixArtSigmaPipeline": Recipe(PIXART, plan=transformers.PIXART_SIGMA, exported=True),
        "DiTPipeline": Recipe(
            {"transformer": "dit", "vae": "vae"}, plan=transformers.DIT, exported=True
        ),
        "AuraFlowPipeline": Recipe(
            {"transformer": "auraflow", "vae": "vae"},
            plan=transformers.AURAFLOW,
            upcasts=True,
            exported=True,
        ),
        "ZImagePipeline": Recipe(
            {"transformer": "zimage", "vae": "vae"}, plan=transformers.ZIMAGE, exported=True
        ),
        "QwenImagePipeline": Recipe({"transformer": "qwen"}, plan=transformers.QWEN, exported=True),
        "StableDiffusion3ControlNetInpaintingPipeline": Recipe(joint),
        flux: Recipe(FLUX, plan=transformers.FLUX, exported=True),
        "FluxImg2ImgPipeline": Recipe(FLUX, plan=transformers.FLUX_PICTURE, from_text=flux),
        "FluxInpaintPipeline": Recipe(FLUX, plan=transformers.FLUX_INPAINT, from_text=flux),
        "FluxFillPipeline": Recipe(FLUX, plan=transformers.FLUX_FILL, exported=True),
        "FluxControlPipeline": Recipe(FLUX, plan=transformers.FLUX_CONTROL, exported=True),
        "FluxControlImg2ImgPipeline": Recipe(FLUX, plan=transformers.FLUX_CONTROL),
        "FluxControlInpaintPipeline": Recipe(FLUX, plan=transformers.FLUX_CONTROL_INPAINT),
        kontext: Recipe(FLUX, plan=transformers.FLUX_KONTEXT, from_text=kontext),
        "FluxKontextInpaintPipeline": Recipe(
            FLUX, plan=transformers.FLUX_KONTEXT_INPAINT, from_text=kontext
        ),
        second: Recipe(FLUX2, plan=transformers.FLUX2, from_text=second, exported=True),
        klein: Recipe(FLUX2, plan=transformers.FLUX2_KLEIN, from_text=klein, exported=True),
        "FluxControlNetPipeline": Recipe(flowing, plan=transformers.FLUX_CONTROLNET),
        "FluxControlNetImg2ImgPipeline": Recipe(flowing, plan=transformers.FLUX_CONTROLNET_PICTURE),
        "FluxControlNetInpaintPipeline": Recipe(flowing, plan=transformers.FLUX_CONTROLNET_INPAINT),
        "StableDiffusionUpscalePipeline": Recipe(plan=unets.UPSCALE, upcasts=True),
        "LDMTextToImagePipeline": Recipe({"unet": "unet", "vqvae": "vae"}, plan=unets.LDM),
        "LDMSuperResolutionPipeline": Recipe(
            {"unet": "unet2d", "vqvae": "vae"}, plan=unets.LDM_PICTURE
        ),
        **{name: Recipe({"unet": "unet"}, plan=plan) for name, plan in deepfloyd.PLANS.items()},
        "DDPMPipeline": Recipe(UNET2D, plan=unets.DDPM, exported=True),
        "DDIMPipeline": Recipe(UNET2D, plan=unets.DDIM, exported=True),
        "ConsistencyModelPipeline": Recipe(UNET2D, plan=unets.CONSISTENCY, exported=True),
        "UnCLIPPipeline": Recipe(prior | pixels, plan=priors.UNCLIP),
        "UnCLIPImageVariationPipeline": Recipe(pixels, plan=priors.VARIATION),
        "StableUnCLIPPipeline": Recipe({"unet": "unet", **prior, **UNET}, plan=priors.STABLE),
        "StableUnCLIPImg2ImgPipeline": Recipe(plan=priors.STABLE_PICTURE),
        "KandinskyV22PriorPipeline": Recipe(prior, plan=priors.KANDINSKY),
        "KandinskyV22PriorEmb2EmbPipeline": Recipe(prior, plan=priors.KANDINSKY_EMB2EMB),
        "KandinskyV22Pipeline": Recipe(MOVQ, plan=unets.KANDINSKY),
        "KandinskyV22Img2ImgPipeline": Recipe(MOVQ, plan=unets.KANDINSKY),
        "KandinskyV22InpaintPipeline": Recipe(MOVQ, plan=unets.KANDINSKY_INPAINT),
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


def factor_of(pipe: Any) -> int:
    """Pixels per side of a latent; 1 if the network draws pixels."""
    vae, told = autoencoder(pipe), getattr(pipe, "vae_scale_factor", None)
    if told is not None or vae is None:
        return int(told or 1)
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def side_of(pipe: Any) -> int:
    """The side of the latents of a picture of its own size: the pipeline's, its network's, or that
    of `PIXELS`."""
    own = getattr(pipe, "default_sample_size", None) or denoiser(pipe).config.get("sample_size")
    return int(own or PIXELS // factor_of(pipe))


def guides_with(takes: Mapping[str, Any]) -> str | None:
    """The argument of a pipeline's call that scales its guidance: the distilled one, unless most of
    its networks do not take it; None if the pipeline takes none."""
    told = takes.get("guidance_scale")
    if "true_cfg_scale" in takes and (told is None or told.default is None):
        return "true_cfg_scale"
    return None if told is None else "guidance_scale"


def negates(takes: Mapping[str, Any]) -> bool:
    """Whether a pipeline's call uses a negative prompt without a second scale being given."""
    true = takes.get("true_cfg_scale")
    return "negative_prompt" in takes and (true is None or true.default > 1)


def needs_picture(cls: type) -> bool:
    """Whether the call of a pipeline class begins with a picture, and cannot do without."""
    recipe, call = recipe_of_class(cls), inspect.signature(cls.__call__)
    without = recipe is not None and recipe.from_text == cls.__name__
    return not without and not PICTURES.isdisjoint(call.parameters)


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
