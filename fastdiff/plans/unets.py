"""The plans of pipelines whose loop repeats a U-Net."""

from dataclasses import replace

from fastdiff.plans import Plan

_TEXT = {
    "encoder_hidden_states": "prompt_embeds",
    "timestep_cond": "timestep_cond",
    "image_embeds": "image_embeds",
}
_PERTURBED = {"image_embeds": "ip_adapter_image_embeds"}
_ADDED = {"text_embeds": "add_text_embeds", "time_ids": "add_time_ids"}
SD = Plan(
    _TEXT,
    ("prompt_embeds", "timestep_cond"),
    ("prompt_embeds",),
    attention_kwargs="cross_attention_kwargs",
    pictures="image_embeds",
    step_options="extra_step_kwargs",
)
XL = replace(
    SD,
    conditions=_TEXT | _ADDED,
    returned=("prompt_embeds", "add_text_embeds", "add_time_ids"),
)
PAG = replace(SD, conditions=_TEXT | _PERTURBED)
XL_PAG = replace(XL, conditions=_TEXT | _ADDED | _PERTURBED)
SD_INPAINT, XL_INPAINT, PAG_INPAINT, XL_PAG_INPAINT = (
    replace(plan, noises="add_noise", constant_channels=("mask", "masked_image_latents"))
    for plan in (SD, XL, PAG, XL_PAG)
)
# diffusers' own loop raises where it would rescale perturbed guidance
PAG_INPAINT = replace(PAG_INPAINT, refused={"guidance_rescale": lambda rescale: rescale > 0})
LCM = replace(
    SD,
    conditions=_TEXT | {"timestep_cond": "w_embedding"},
    required=("prompt_embeds", "w_embedding"),
    entrance="progress_bar",
    results=("denoised",),
    schedulers=("LCMScheduler",),
    scaled="",
)
DDPM = Plan(
    conditions={},
    required=(),
    returned=(),
    step_arguments=("generator",),
    latents="image",
    entrance="progress_bar",
    iterates=True,
    scaled="",
)
DDIM = replace(DDPM, step_arguments=("eta", "use_clipped_model_output", "generator"))
CONSISTENCY = Plan(
    conditions={"class_labels": "class_labels"},
    required=("class_labels",),
    returned=(),
    step_arguments=("generator",),
    latents="sample",
    entrance="progress_bar",
)
UPSCALE = Plan(
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
LDM = Plan(
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
LDM_PICTURE = Plan(
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
KANDINSKY = Plan(
    conditions={"image_embeds": "image_embeds"},
    required=("image_embeds",),
    returned=(),
    step_arguments=("generator",),
    entrance="progress_bar",
    iterates=True,
    timesteps="timesteps",
    scaled="",
    variance="found",
)
KANDINSKY_INPAINT = replace(
    KANDINSKY,
    noises="add_noise",
    inverted=("mask_image", "image"),
    constant_channels=("masked_image", "mask_image"),
)
