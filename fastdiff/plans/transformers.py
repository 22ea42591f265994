"""The plans of pipelines with a transformer."""

from dataclasses import replace

from fastdiff.plans import Plan

SD3 = Plan(
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
SD3_PICTURE = replace(SD3, returned=("prompt_embeds",), skips={})
SD3_INPAINT = replace(SD3_PICTURE, noises="scale_noise")
DIT = Plan(
    conditions={"class_labels": "class_labels_input"},
    required=("class_labels_input",),
    returned=(),
    network="transformer",
    settings={"guidance_scale": "guidance_scale"},
    latents="latent_model_input",
    entrance="progress_bar",
    iterates=True,
    scaled="sample",
    conditional_first=True,
    only_above_one=True,
    doubled=True,
    drops_variance=True,
)
PIXART_SIGMA = Plan(
    conditions={
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
        "added_cond_kwargs": "added_cond_kwargs",
    },
    required=("prompt_embeds", "prompt_attention_mask", "added_cond_kwargs"),
    returned=(),
    settings={
        "guidance_scale": "guidance_scale",
        "do_classifier_free_guidance": "do_classifier_free_guidance",
    },
    step_options="extra_step_kwargs",
    entrance="progress_bar",
    drops_variance=True,
)
PIXART_ALPHA = replace(PIXART_SIGMA, many_steps=True)
AURAFLOW = Plan(
    conditions={"encoder_hidden_states": "prompt_embeds"},
    required=("prompt_embeds",),
    returned=("prompt_embeds",),
    settings={
        "guidance_scale": "guidance_scale",
        "do_classifier_free_guidance": "do_classifier_free_guidance",
    },
    attention_kwargs="attention_kwargs",
    told=lambda timesteps, dtype: (timesteps / 1000).to(dtype),
    entrance="progress_bar",
    scaled="",
)
_FLUX = Plan(
    conditions={
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
        "img_ids": "latent_image_ids",
        "txt_ids": "text_ids",
        "guidance": "guidance",
    },
    required=("prompt_embeds", "pooled_prompt_embeds", "latent_image_ids", "text_ids", "guidance"),
    unbatched=("img_ids", "txt_ids"),
    returned=("prompt_embeds",),
    attention_kwargs="joint_attention_kwargs",
    only_read=True,
    scaled="",
    told=lambda timesteps, dtype: timesteps.to(dtype) / 1000,
)
FLUX_PICTURE = replace(
    _FLUX,
    conditions={**_FLUX.conditions, "ip_adapter_image_embeds": "image_embeds"},
    pictures="ip_adapter_image_embeds",
    settings={"guidance_scale": "true_cfg_scale", "do_classifier_free_guidance": "do_true_cfg"},
    unconditional={
        "encoder_hidden_states": "negative_prompt_embeds",
        "pooled_projections": "negative_pooled_prompt_embeds",
        "ip_adapter_image_embeds": "negative_image_embeds",
    },
)
FLUX = replace(FLUX_PICTURE, alike={"txt_ids": "negative_text_ids"})
FLUX_INPAINT = replace(FLUX_PICTURE, noises="scale_noise")
FLUX_FILL = replace(_FLUX, constant_channels=("masked_image_latents",), always=True)
FLUX_CONTROL = replace(_FLUX, constant_channels=("control_image",), always=True)
FLUX_KONTEXT = replace(
    FLUX,
    conditions={
        **FLUX.conditions,
        "img_ids": "latent_ids",
        "constant_tokens": "image_latents",
    },
    required=("prompt_embeds", "pooled_prompt_embeds", "latent_ids", "text_ids", "guidance"),
)
FLUX_CONTROL_INPAINT = replace(FLUX_CONTROL, noises="scale_noise", packs=True)
FLUX_KONTEXT_INPAINT = replace(
    FLUX_KONTEXT,
    conditions={**FLUX_KONTEXT.conditions, "constant_tokens": "image_reference_latents"},
    instead={"constant_tokens": "image_latents"},
    noises="scale_noise",
)
_CONTROLLED = replace(
    _FLUX,
    conditions={
        **{name: held for name, held in _FLUX.conditions.items() if name != "guidance"},
        "controlnet_blocks_repeat": "controlnet_blocks_repeat",
    },
    required=("prompt_embeds", "pooled_prompt_embeds", "latent_image_ids", "text_ids"),
    controls="controlnet",
    distilled="guidance_scale",
    only_read=False,
)
FLUX_CONTROLNET_PICTURE = _CONTROLLED
FLUX_CONTROLNET_INPAINT = replace(_CONTROLLED, noises="scale_noise")
FLUX_CONTROLNET = replace(
    _CONTROLLED,
    conditions={**_CONTROLLED.conditions, "ip_adapter_image_embeds": "image_embeds"},
    **{name: getattr(FLUX_PICTURE, name) for name in ("pictures", "settings", "unconditional")},
)
FLUX2 = replace(
    _FLUX,
    conditions={
        "encoder_hidden_states": "prompt_embeds",
        "img_ids": "latent_ids",
        "txt_ids": "text_ids",
        "guidance": "guidance",
        "constant_tokens": "image_latents",
        "constant_ids": "image_latent_ids",
    },
    required=("prompt_embeds", "latent_ids", "text_ids", "image_latents", "image_latent_ids"),
    attention_kwargs="attention_kwargs",
)
FLUX2_KLEIN = replace(
    FLUX2,
    conditions={name: held for name, held in FLUX2.conditions.items() if name != "guidance"},
    unconditional={"encoder_hidden_states": "negative_prompt_embeds"},
    alike={"txt_ids": "negative_text_ids"},
)
ZIMAGE = Plan(
    conditions={"cap_feats": "prompt_embeds"},
    required=("prompt_embeds",),
    returned=("prompt_embeds",),
    unconditional={"cap_feats": "negative_prompt_embeds"},
    conditional_first=True,
    beyond=True,
    fixed={"negated": True},
    refused={"cfg_normalization": bool, "cfg_truncation": lambda at: at is not None and at < 1},
    attention_kwargs="joint_attention_kwargs",
    told=lambda timesteps, dtype: (1000 - timesteps) / 1000,
    float32=True,
    scaled="",
)
QWEN = Plan(
    conditions={
        "encoder_hidden_states": "prompt_embeds",
        "encoder_hidden_states_mask": "prompt_embeds_mask",
        "img_shapes": "img_shapes",
        "negative": "negative_prompt_embeds",
        "negative_mask": "negative_prompt_embeds_mask",
        "true_cfg_scale": "true_cfg_scale",
        "do_true_cfg": "do_true_cfg",
    },
    required=("prompt_embeds", "prompt_embeds_mask", "img_shapes", "do_true_cfg"),
    returned=("prompt_embeds",),
    absent=("guidance",),
    attention_kwargs="attention_kwargs",
    told=lambda timesteps, dtype: timesteps.to(dtype) / 1000,
    scaled="",
)
