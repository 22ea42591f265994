"""The loops of DeepFloyd IF's cascade, which draw pixels."""

from dataclasses import replace

from fastdiff.plans import Plan

_ASKED = ("guidance_scale", "do_classifier_free_guidance", "cross_attention_kwargs")
IF_PLAN = Plan(
    conditions={"encoder_hidden_states": "prompt_embeds"},
    required=("prompt_embeds",),
    returned=(),
    attention_kwargs="cross_attention_kwargs",
    step_options="extra_step_kwargs",
    latents="intermediate_images",
    entrance="progress_bar",
    settings={name: name for name in _ASKED},
    variance=True,
)
IF_ENLARGED_PLAN = replace(
    IF_PLAN,
    conditions={"encoder_hidden_states": "prompt_embeds", "class_labels": "noise_level"},
    required=("prompt_embeds", "noise_level"),
    repeated=("class_labels",),
    constant_channels=("upscaled",),
    scaled="input",
)
_INPAINTING, _INPAINTING_ENLARGED = (
    replace(plan, kept="mask_image") for plan in (IF_PLAN, IF_ENLARGED_PLAN)
)
PLANS = {
    "IFPipeline": IF_PLAN,
    "IFImg2ImgPipeline": IF_PLAN,
    "IFInpaintingPipeline": _INPAINTING,
    "IFSuperResolutionPipeline": IF_ENLARGED_PLAN,
    "IFImg2ImgSuperResolutionPipeline": IF_ENLARGED_PLAN,
    "IFInpaintingSuperResolutionPipeline": _INPAINTING_ENLARGED,
}
"""By pipeline class."""
