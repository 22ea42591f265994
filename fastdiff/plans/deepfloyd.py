"""The loops of DeepFloyd IF's cascade, which draw pixels."""

from dataclasses import replace

from fastdiff.plans import Plan

_ASKED = ("guidance_scale", "do_classifier_free_guidance", "cross_attention_kwargs")
IF = Plan(
    conditions={"encoder_hidden_states": "prompt_embeds"},
    required=("prompt_embeds",),
    returned=(),
    attention_kwargs="cross_attention_kwargs",
    step_options="extra_step_kwargs",
    latents="intermediate_images",
    entrance="progress_bar",
    settings={name: name for name in _ASKED},
    variance="asked",
)
IF_ENLARGED = replace(
    IF,
    conditions={"encoder_hidden_states": "prompt_embeds", "class_labels": "noise_level"},
    required=("prompt_embeds", "noise_level"),
    repeated=("class_labels",),
    constant_channels=("upscaled",),
    scaled="input",
)
_INPAINTING, _INPAINTING_ENLARGED = (replace(plan, kept="mask_image") for plan in (IF, IF_ENLARGED))
PLANS = {
    "IFPipeline": IF,
    "IFImg2ImgPipeline": IF,
    "IFInpaintingPipeline": _INPAINTING,
    "IFSuperResolutionPipeline": IF_ENLARGED,
    "IFImg2ImgSuperResolutionPipeline": IF_ENLARGED,
    "IFInpaintingSuperResolutionPipeline": _INPAINTING_ENLARGED,
}
"""By pipeline class."""
